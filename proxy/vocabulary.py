"""The bytes of each token, for log probabilities and echoes: exact where a token is half a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from transfer.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Token ids to bytes, read once from a fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"{tokenizer.name_or_path} has no tokenizer.json (pair.hf_dir); save it with one")
        self._tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._added = {number: str(added) for number, added in tokenizer.added_tokens_decoder.items()}
        self._special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.byte_level = _is_byte_level(json.loads(tokenizer.backend_tokenizer.decoder.__getstate__()))

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` adds to a text; nothing for ids that the tokenizer does not have."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokens[token] if token < len(self._tokens) else None
        if piece is None:
            return b""
        if self.byte_level:
            return bytes(_BYTES[character] for character in piece)
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def shown(self, token: int) -> bytes:
        """The bytes of ``token`` in an answer's text, where both engines leave special tokens out."""
        return b"" if token in self._special else self.piece(token)

    def text(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``, special ones included; what is no whole character becomes U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", ())))


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones stand for themselves (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_characters()
