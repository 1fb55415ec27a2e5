"""Real injection into real cells of a model of zeros."""

from measurements.link_inject import measure
from measurements.link_synthetic import TOKEN_BYTES


def test_both_ways_move_the_same_chunks_and_stalls_follow():
    samples = list(measure(2, num_cells=128, chunk_tokens=64))
    by_way = {way: [s for s in samples if s["way"] == way] for way in ("inject", "memcpy", "stall")}
    assert len(by_way["inject"]) == len(by_way["memcpy"]) == 2 * (128 // 64)
    assert {s["kv_bytes"] // TOKEN_BYTES for s in by_way["inject"] + by_way["memcpy"]} == {64}
    assert len({s["chunk_tokens"] for s in by_way["stall"]}) == 1
    assert all(s["chunk_tokens"] % 32 == 0 and s["seconds"] > 0 for s in by_way["stall"])
