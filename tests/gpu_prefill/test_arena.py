from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_prefill.arena import ALIGNMENT_BYTES, Arena

UNITS = 20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8 * ALIGNMENT_BYTES), st.integers(0, 100)), max_size=60))
def test_pieces_never_overlap_and_all_memory_returns(steps):
    arena = Arena(UNITS * ALIGNMENT_BYTES + 7)
    owner: dict[int, int] = {}
    pieces: dict[int, range] = {}
    for takes, size_bytes, pick in steps:
        if takes:
            units = -(-size_bytes // ALIGNMENT_BYTES)
            offset = arena.take(size_bytes)
            if offset is None:
                free = "".join("x" if unit in owner else "." for unit in range(UNITS))
                assert "." * units not in free
                continue
            assert offset % ALIGNMENT_BYTES == 0
            pieces[offset] = range(offset // ALIGNMENT_BYTES, offset // ALIGNMENT_BYTES + units)
            for unit in pieces[offset]:
                assert 0 <= unit < UNITS
                assert owner.setdefault(unit, offset) == offset
        elif pieces:
            offset = sorted(pieces)[pick % len(pieces)]
            for unit in pieces.pop(offset):
                del owner[unit]
            arena.give_back(offset)
        assert arena.used_bytes == len(owner) * ALIGNMENT_BYTES
    for offset in pieces:
        arena.give_back(offset)
    assert arena.take(UNITS * ALIGNMENT_BYTES) == 0
