"""The codec table: how KV elements become payload bytes and land in cells.

Elements are the 16-bit values that vLLM holds (bf16 or f16). A codec encodes a frame's elements, a flat array in the
order of ``transfer/layout.py`` (planes: K rows, V rows, K rows, ...), and decodes a payload straight into the decode
node's cells, given as consecutive destination arrays. Conversions round to nearest even. An infinity or NaN is refused
on arrival, for llama.cpp reads masked cells too and one of them poisons every token; every codec but ``raw``, which
does not look at what it sends, refuses it before.

========  ==  =========================================================================  =============
name      id  payload for N elements                                                     bits / element
========  ==  =========================================================================  =============
``raw``   1   the elements, little endian                                                16
``lz4``   2   u32 length L; N bytes low plane; L bytes LZ4 block of the N-byte high      13 to 14, bf16
              plane. bf16: high = exponent, low = sign and mantissa. f16: high and low
              byte. Lossless.
``q8``    3   fp16 scale of every 32 elements; then N int8 codes. scale = amax / 127,    8.5
              code = round half away(x / scale): llama.cpp's ``quantize_row_q8_0_ref``
              (ggml/src/ggml-quants.c), stored as two planes. Every plane must divide by
              32: a chunk may be of any length where heads * head_dim does. Where a
              rank's heads do not, its frames of other lengths go by ``raw``.
``zstd``  4   as ``lz4``, but L bytes are one Zstandard frame (RFC 8878) that declares   10 to 11, bf16
              its content size, N, and a window of 256 KiB at most. Lossless.
``k8v4``  5   for each plane of n elements: K as ``q8``; V: fp16 scale of every 32, then   6.5, K and V
              n / 2 bytes. scale = m / -8, m the first element of largest magnitude;       the same size
              code = min(15, trunc(x / scale + 8.5)); byte j of a block holds code j in
              its low half and code j + 16 in its high half: llama.cpp's
              ``quantize_row_q4_0_ref``, as two planes. Every n must divide by 32.
``kvz1``  6   uniform quantizer and entropy coder (``transfer/kvz.py``); steps of .1 RMS    varies
              for K and .2 RMS for V
``kvz2``  7   the same with .2 and .2                                                       varies
``kvz3``  8   the same with .25 and .5                                                      varies
rows_*    9+  ``rows_q8_0`` 9, ``rows_k8v4`` 10, ``rows_q4_0`` 11: rotated and quantized    8.5, 6.5, 4.5
              into the very rows of llama.cpp's cells (``transfer/rows.py``); the only
              ones that land in cells of these types. Heads must divide by 64.
========  ==  =========================================================================  =============
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import lz4.block
import numpy as np
import numpy.typing as npt

from transfer import entropy, kernels, kvz, rows
from transfer.errors import CodecError
from transfer.frames import Element
from transfer.geometry import NO_KV, KVGeometry
from transfer.kernels import BLOCK, require_finite
from transfer.layout import Bytes, CellType, Elements, Payload, Slab

# What a decoder writes into cells of each type: elements, or blocks whose only floats are f16 scales.
CELL_ELEMENT: dict[CellType, Element] = {
    "f16": Element.F16,
    "bf16": Element.BF16,
    "q8_0": Element.F16,
    "k8v4": Element.F16,
    "q4_0": Element.F16,
}

_LENGTH = struct.Struct("<I")


class Codec(NamedTuple):
    """One row of the table.

    ``encode(elements, element, slab)`` returns the payload of ``elements``, contiguous uint16 ``[n]``: the planes of
    ``slab``; ``raw``'s payload is a view of them. ``decode(payload, element, cells, outs, tokens)`` fills ``outs``, one
    contiguous uint16 array for each plane, which holds the positions ``tokens`` of the prompt; ``cells`` is
    ``CELL_ELEMENT`` of a cell type in ``lands_in``. Both raise :class:`CodecError`; a failed decode leaves ``outs``
    partly written. ``row_elements`` divides the rows of the models whose KV the codec takes in chunks of any length.
    """

    name: str
    wire_id: int
    encode: Callable[[Elements, Element, Slab], Payload]
    decode: Callable[[Payload, Element, Element, Sequence[Elements], range], None]
    lands_in: tuple[CellType, ...] = ("f16", "bf16")
    row_elements: int = 1

    def fits(self, cell_type: CellType, geometry: KVGeometry | None) -> bool:
        """Whether KV of ``geometry``, None for any, can land in cells of ``cell_type``; ``NO_KV`` cannot."""
        if geometry == NO_KV:
            return False
        head_dims = (geometry.head_dim_k, geometry.head_dim_v) if geometry else ()
        heads = geometry.num_kv_heads if geometry else 1
        return cell_type in self.lands_in and not any(heads * dim % self.row_elements for dim in head_dims)

    def of_frame(self, planes: Sequence[int]) -> Codec:
        """What a frame with ``planes`` of so many elements travels by on a ticket for this codec.

        ``raw`` if one would end inside a block: a rank's heads may make such rows where the whole model's do not.
        """
        return CODECS["raw"] if any(count % self.row_elements for count in planes) else self


def _count(outs: Sequence[Elements]) -> int:
    return sum(out.size for out in outs)


def _spans(outs: Sequence[Elements]) -> Iterator[tuple[Elements, slice]]:
    """Each destination with the range of the frame's elements that belongs into it."""
    at = 0
    for out in outs:
        yield out, slice(at, at + out.size)
        at += out.size


def _expect(payload: Payload, expected_bytes: int) -> None:
    if len(payload) != expected_bytes:
        raise CodecError(f"payload has {len(payload)} bytes, its elements need {expected_bytes}")


def _encode_raw(elements: Elements, _element: Element, _slab: Slab) -> Payload:
    return elements.view(np.uint8).data


def _decode_raw(payload: Payload, element: Element, cells: Element, outs: Sequence[Elements], _tokens: range) -> None:
    _expect(payload, 2 * _count(outs))
    source = np.frombuffer(payload, np.dtype("<u2"))
    for out, span in _spans(outs):
        require_finite(kernels.convert(source[span], out, element, cells), cells)


def _compress_lz4(plane: Bytes) -> bytes:
    return bytes(lz4.block.compress(plane.data, store_size=False))


def _decompress_lz4(packed: memoryview, num_bytes: int) -> bytes:
    try:
        return bytes(lz4.block.decompress(packed, uncompressed_size=num_bytes))
    except lz4.block.LZ4BlockError as error:
        raise CodecError(f"lz4 plane is corrupt: {error}") from None


def _encode_split(compress: Callable[[Bytes], bytes], elements: Elements, element: Element, _slab: Slab) -> Payload:
    count = elements.size
    planes = np.empty((2, count), np.uint8)
    require_finite(kernels.split(elements, planes[0], planes[1], element), element)
    high = compress(planes[0])
    payload = bytearray(_LENGTH.size + count + len(high))
    _LENGTH.pack_into(payload, 0, len(high))
    payload[_LENGTH.size : _LENGTH.size + count] = planes[1].data
    payload[_LENGTH.size + count :] = high
    return payload


def _decode_split(
    decompress: Callable[[memoryview, int], bytes],
    payload: Payload,
    element: Element,
    cells: Element,
    outs: Sequence[Elements],
    _tokens: range,
) -> None:
    count = _count(outs)
    if len(payload) < _LENGTH.size + count:
        raise CodecError(f"payload of {len(payload)} bytes is too short for {count} elements")
    (length,) = _LENGTH.unpack_from(payload)
    _expect(payload, _LENGTH.size + count + length)
    view = memoryview(payload)
    high = decompress(view[_LENGTH.size + count :], count)
    if len(high) != count:
        raise CodecError(f"high plane decodes to {len(high)} bytes, not {count}")
    high_plane = np.frombuffer(high, np.uint8)
    low_plane = np.frombuffer(view[_LENGTH.size : _LENGTH.size + count], np.uint8)
    for out, span in _spans(outs):
        require_finite(kernels.merge(high_plane[span], low_plane[span], out, element, cells), cells)


def _quantized_bytes(count: int, code_bits: int) -> int:
    if count % BLOCK:
        raise CodecError(f"planes must be multiples of {BLOCK} elements, not {count}; raw, lz4, zstd and kvz take any")
    return 2 * (count // BLOCK) + count * code_bits // 8


def _scales_and_codes(payload: Bytes, count: int) -> tuple[npt.NDArray[np.uint16], Bytes]:
    scale_bytes = 2 * (count // BLOCK)
    return payload[:scale_bytes].view(np.dtype("<u2")), payload[scale_bytes:]


def _encode_q8(elements: Elements, element: Element, slab: Slab) -> Payload:
    payload = np.empty(sum(_quantized_bytes(count, 8) for count in slab.planes), np.uint8)
    scales, codes = _scales_and_codes(payload, elements.size)
    require_finite(kernels.quantize_q8(elements, scales, codes, element), Element.F16)
    return payload.data


def _decode_q8(payload: Payload, _element: Element, cells: Element, outs: Sequence[Elements], _tokens: range) -> None:
    _expect(payload, sum(_quantized_bytes(out.size, 8) for out in outs))
    scales, codes = _scales_and_codes(np.frombuffer(payload, np.uint8), _count(outs))
    require_finite(kernels.largest(scales), Element.F16)
    for out, span in _spans(outs):
        out_scales = scales[span.start // BLOCK : span.stop // BLOCK]
        require_finite(kernels.dequantize_q8(out_scales, codes[span], out, cells), cells)


def _k8v4_bytes(planes: Sequence[int]) -> list[int]:
    return [_quantized_bytes(count, (8, 4)[index % 2]) for index, count in enumerate(planes)]


def _encode_k8v4(elements: Elements, element: Element, slab: Slab) -> Payload:
    sizes_bytes = _k8v4_bytes(slab.planes)
    payload = np.empty(sum(sizes_bytes), np.uint8)
    first, at = 0, 0
    for index, (count, size_bytes) in enumerate(zip(slab.planes, sizes_bytes, strict=True)):
        scales, codes = _scales_and_codes(payload[at : at + size_bytes], count)
        quantize = kernels.quantize_q4 if index % 2 else kernels.quantize_q8
        require_finite(quantize(elements[first : first + count], scales, codes, element), Element.F16)
        first, at = first + count, at + size_bytes
    return payload.data


def _decode_k8v4(payload: Payload, _element: Element, cells: Element, outs: Sequence[Elements], _tokens: range) -> None:
    sizes_bytes = _k8v4_bytes([out.size for out in outs])
    _expect(payload, sum(sizes_bytes))
    whole = np.frombuffer(payload, np.uint8)
    at = 0
    for index, (out, size_bytes) in enumerate(zip(outs, sizes_bytes, strict=True)):
        scales, codes = _scales_and_codes(whole[at : at + size_bytes], out.size)
        require_finite(kernels.largest(scales), Element.F16)
        dequantize = kernels.dequantize_q4 if index % 2 else kernels.dequantize_q8
        require_finite(dequantize(scales, codes, out, cells), cells)
        at += size_bytes


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("raw", 1, _encode_raw, _decode_raw),
        Codec("lz4", 2, partial(_encode_split, _compress_lz4), partial(_decode_split, _decompress_lz4)),
        Codec("q8", 3, _encode_q8, _decode_q8, row_elements=BLOCK),
        Codec("zstd", 4, partial(_encode_split, entropy.compress), partial(_decode_split, entropy.decompress)),
        Codec("k8v4", 5, _encode_k8v4, _decode_k8v4, row_elements=BLOCK),
        *(
            Codec(name, wire_id, partial(kvz.encode, ratios), kvz.decode)
            for wire_id, (name, ratios) in enumerate(kvz.PRESETS.items(), 6)
        ),
        *(
            Codec(f"rows_{cells}", wire_id, partial(rows.encode, cells), partial(rows.decode, cells), (cells,))
            for wire_id, cells in enumerate(rows.CELL_TYPES, 9)
        ),
    )
}
_BY_WIRE_ID = {codec.wire_id: codec for codec in CODECS.values()}


def by_name(name: str) -> Codec:
    """The codec called ``name``; :class:`CodecError` lists the known ones."""
    if name not in CODECS:
        raise CodecError(f"unknown codec {name!r}; this node has {', '.join(CODECS)}")
    return CODECS[name]


def by_wire_id(wire_id: int) -> Codec:
    """The codec with ``wire_id``; :class:`CodecError` if there is none."""
    if wire_id not in _BY_WIRE_ID:
        raise CodecError(f"unknown codec number {wire_id}; this node has {sorted(_BY_WIRE_ID)}")
    return _BY_WIRE_ID[wire_id]


def for_cells(name: str, cell_type: CellType, geometry: KVGeometry | None = None) -> Codec:
    """The codec called ``name``; :class:`CodecError` lists others if it cannot land in such cells."""
    codec = by_name(name)
    if geometry == NO_KV:
        raise CodecError("KV of this model cannot be split, by no codec")
    if not codec.fits(cell_type, geometry):
        others = ", ".join(landing_codecs(cell_type, geometry))
        of_model = "" if cell_type not in codec.lands_in else f" of rows that {codec.row_elements} does not divide"
        raise CodecError(f"codec {name} cannot land in {cell_type} cells{of_model}; use {others}")
    return codec


def landing_codecs(cell_type: CellType, geometry: KVGeometry | None = None) -> tuple[str, ...]:
    """The codecs by which KV of ``geometry``, None for any, can land in such cells, the preferred one first."""
    return tuple(codec.name for codec in CODECS.values() if codec.fits(cell_type, geometry))
