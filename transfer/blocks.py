"""Names of KV blocks: chained hashes, made alike by the proxy and by every worker, so that equal names mean equal KV.

A block is ``block_tokens`` tokens behind all that stand before them. Its name is BLAKE2b-256 of the name of the block
before it and of its own tokens; before the first one stands a root, which is made of all that the KV depends on beside
the tokens. Nobody can make two token lists of one name, so nothing foreign ever matches. Stores go by the first 16
bytes of a name and keep the whole beside the KV, to be compared on reading; the proxy's index goes by the first 8.

What is left behind the last full block has no name and stays in RAM: it could only be found under each of its possible
lengths, every turn of a conversation would write it anew, and it saves 63 tokens of prefill at most.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import msgspec

from transfer.geometry import KVGeometry
from transfer.layout import CellType, RopeOrder

BLOCK_TOKENS = 64
NAME_BYTES = 32
SEED_BYTES = 16
KEY_BYTES = 16
INDEX_BYTES = 8
# KV that is as good as the worker's own; lossy codecs are classes of their own.
EXACT = ""
_FORM = b"isthmus KV blocks 1"


def tokens_per_block(geometry: KVGeometry) -> int:
    """Tokens in a block: a sliding window that is shorter than ``BLOCK_TOKENS`` makes them shorter."""
    return min(BLOCK_TOKENS, geometry.sliding_window or BLOCK_TOKENS)


def pool_seed(geometry: KVGeometry, cell_type: CellType, rope_order: RopeOrder, weights: str, engine: str) -> bytes:
    """16 bytes that stand for everything but tokens, fidelity and tenant.

    ``weights`` identifies the model file's contents, ``engine`` the software whose state format the KV is in.
    """
    cells = f"{cell_type} {rope_order}".encode()
    return _digest(_FORM, msgspec.json.encode(geometry), cells, weights.encode(), engine.encode())[:SEED_BYTES]


def root(seed: bytes, fidelity: str, tenant: str) -> bytes:
    """The name that stands before the first block of ``tenant``'s KV, which came by the lossy codec ``fidelity``."""
    return _digest(seed, fidelity.encode(), tenant.encode())


def names(root: bytes, tokens: Sequence[int], block_tokens: int) -> Iterator[bytes]:
    """The names of the full blocks of ``tokens``, one after the other, each made when it is asked for."""
    name = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        packed = struct.pack(f"<{block_tokens}I", *tokens[start : start + block_tokens])
        name = blake2b(name + packed, digest_size=NAME_BYTES).digest()
        yield name


def key(name: bytes) -> bytes:
    """What a store calls the block ``name``."""
    return name[:KEY_BYTES]


def index_key(name: bytes) -> bytes:
    """What the proxy's index calls the block ``name``."""
    return name[:INDEX_BYTES]


def _digest(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=NAME_BYTES)
    for part in parts:
        # With its length: no two lists of parts run together into the same bytes.
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
