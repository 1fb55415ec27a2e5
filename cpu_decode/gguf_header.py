"""A GGUF's metadata without its vocabulary: a reader that walks through it token by token takes seconds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

_LENGTH = struct.Struct("=Q")
_NATIVE = "I"
# Of a number for each token there are many, of a number for each layer there are not.
_MOST_ITEMS = 4096


class HeaderReader(GGUFReader):  # type: ignore[misc]
    """Fields and tensors as ever, but for lists of texts and long lists: the last part of such a field is its length.

    Raises what :class:`gguf.GGUFReader` raises, and :class:`struct.error` where a list goes on behind the file.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != _NATIVE:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        count, start = int(length[0]), orig_offs + 12
        kind = GGUFValueType(item_type[0])
        if kind == GGUFValueType.STRING:
            end = self._behind_texts(start, count)
        elif kind in self.gguf_scalar_to_np and count > _MOST_ITEMS:
            end = start + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, [item_type, length], [], [GGUFValueType.ARRAY, kind]

    def _behind_texts(self, start: int, count: int) -> int:
        data, at = memoryview(self.data), start
        for _ in range(count):
            at += _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
        return at
