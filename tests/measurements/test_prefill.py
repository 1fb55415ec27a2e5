"""What comes of the samples, and the place where exported KV lands; vLLM itself is measured by the command."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from isthmus.up import cluster_on_free_ports, with_keys
from measurements import prefill
from measurements.prefill_sink import Sink
from tests.transfer.kv_plane import GEOMETRY
from transfer import keys
from transfer.config import Pair
from transfer.errors import IsthmusError
from transfer.frames import Element
from transfer.layout import frame_elements
from transfer.sender import KVSender


def sample(way: str, turn: int, seconds: float) -> prefill.Sample:
    stages = {"gather_ns": 10 * turn, "encode_ns": 1, "kv_wire_bytes": 5} if way == prefill.EXPORT else {}
    row = {"part": "length", "way": way, "round": turn, "prompt_tokens": 900, "seconds": seconds, "cached_tokens": 0}
    return row | stages


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    seconds = {1: (1.0, 1.0, 1.25), 2: (2.0, 2.0, 2.0), 3: (4.0, 5.0, 8.0)}
    samples = [
        sample(way, turn, s) for turn, all_s in seconds.items() for way, s in zip(prefill.WAYS, all_s, strict=True)
    ]
    samples += [
        {"part": "cached", "way": prefill.IDLE, "round": 1, "prompt_tokens": 896, "seconds": s, "cached_tokens": c}
        for c, s in ((0, 2.0), (256, 1.5), (256, 1.0))
    ]
    summary = prefill.summarize(samples)
    assert summary["export_on_vs_off_900"] == statistics.median([0.8, 1.0, 0.5])
    assert summary["export_on_vs_off_900_spread"] == [0.5, 1.0]
    assert summary["connector_vs_none_900"] == 1.0
    assert summary["tokens_per_s"]["900"][prefill.PLAIN] == 450
    assert summary["cached_prefix"] == {"0": 2.0, "256": 1.25}
    assert summary["stages"]["900"]["gather_ns"] == 20
    prefill.draw(summary, tmp_path / "prefill.png")
    assert (tmp_path / "prefill.png").stat().st_size > 1000
    assert [table.row_count for table in prefill.tables(summary)] == [1, 2]


@pytest.fixture
def sink(tmp_path: Path):
    cluster = with_keys(cluster_on_free_ports(Pair(name="m", hf_dir="", gguf="")), tmp_path / "keys")
    sink = Sink(cluster, GEOMETRY)
    sender = KVSender(
        GEOMETRY, max_backlog_bytes=1 << 20, frame_bytes=1 << 20, keys=keys.client(tmp_path / "keys", "prefill")
    )
    yield sink, sender
    sender.close()
    sink.close()


def test_prompts_land_one_after_the_other(sink) -> None:
    place, sender = sink
    for num_tokens in (1, 20, 700):
        ticket = place.expect(num_tokens)
        sender.open(ticket)
        for start in range(0, num_tokens, ticket.chunk_tokens):
            tokens = range(start, min(start + ticket.chunk_tokens, num_tokens))
            elements = np.zeros((GEOMETRY.num_layers, frame_elements(GEOMETRY, len(tokens), 1)), np.uint16)
            sender.submit(ticket.ticket, tokens, 0, elements, Element.BF16, 7)
        sender.finish(ticket.ticket, num_tokens)
        stages = place.stages()
        assert stages["gather_ns"] == 7 * -(-num_tokens // ticket.chunk_tokens)
        assert stages["kv_wire_bytes"] >= 2 * GEOMETRY.elements_per_token * num_tokens


def test_a_transfer_that_fails_is_an_error(sink) -> None:
    place, sender = sink
    ticket = place.expect(20)
    sender.open(ticket)
    sender.abort(ticket.ticket, "vLLM gave up")
    with pytest.raises(IsthmusError, match="vLLM gave up"):
        place.stages()
