"""The simulated prefill hands over every layer of every chunk once, in the exporter's groups, none before its time."""

import time

import numpy as np
import pytest

from measurements.link_exposed import AT_HOOK, Prefilling, Prompt, lone_frame
from measurements.link_sender import Peer
from measurements.link_synthetic import GEOMETRY, TOKEN_BYTES
from tests.measurements.link_agent import serving
from transfer.layout import layers_together

PROMPT = Prompt(num_tokens=40, tokens_per_s=4000.0, step_tokens=16, chunk_tokens=8)


class Recorder:
    """A sender that notes what it is given, and when."""

    def __init__(self):
        self.slabs = []

    def submit(self, _ticket, tokens, first_layer, elements, _element, _gather_ns):
        self.slabs.append((time.monotonic_ns(), tokens, range(first_layer, first_layer + len(elements))))
        return True


class Ticket:
    ticket = "0" * 32


def prefill(handed_over):
    prefilling, recorder = Prefilling(None, PROMPT), Recorder()
    began = ended = time.monotonic_ns()
    for step in prefilling._steps:
        ended = prefilling._compute(recorder, Ticket, step, ended, handed_over)
    return recorder.slabs, began, ended


def test_every_layer_leaves_once_and_in_order():
    slabs, _, _ = prefill(AT_HOOK)
    seen = {}
    for _, tokens, layers in slabs:
        assert layers.start == seen.get(tokens, 0)
        seen[tokens] = layers.stop
    assert list(seen) == [range(start, start + 8) for start in range(0, 40, 8)]
    assert set(seen.values()) == {GEOMETRY.num_layers}
    # The last layer leaves alone.
    assert all(layers == range(31, 32) for _, _, layers in slabs[-1:])


@pytest.mark.parametrize("handed_over", [AT_HOOK, 1.0])
def test_no_layer_leaves_before_it_is_due(handed_over):
    slabs, began, ended = prefill(handed_over)
    for at, tokens, layers in slabs:
        step_start = tokens.start // 16 * 16
        computed = step_start + min(16, 40 - step_start) * (layers.stop - 1 + handed_over) / GEOMETRY.num_layers
        assert at >= began + int(computed / PROMPT.tokens_per_s * 1e9) - 1000
    assert ended - began >= 40 / 4000 * 1e9 - 1000


def test_nothing_leaves_without_overlap():
    slabs, began, ended = prefill(None)
    assert slabs == []
    assert ended - began >= 40 / 4000 * 1e9 - 1000


def test_groups_shrink_towards_the_last_layer():
    left, groups = 32, []
    while left:
        groups.append(layers_together(left, 8))
        left -= groups[-1]
    assert groups == [8, 8, 8, 4, 2, 1, 1]
    assert layers_together(1, 4) == 1


def test_prefills_land_with_and_without_overlap(tmp_path):
    with serving(tmp_path) as (agent, endpoint):
        peer = Peer(endpoint)
        try:
            prefilling = Prefilling(peer, PROMPT)
            for codec, seal, overlap in (("raw", "none", True), ("q8", "aes-gcm", True), ("raw", "none", False)):
                sample = prefilling.exposed(codec, seal, overlap=overlap)
                assert sample["kv_bytes"] == 40 * TOKEN_BYTES
                assert np.isclose(sample["fraction"], sample["seconds"] / 0.01)
            assert prefilling.exposed("q8", "none", late=True)["kv_bytes"] == 40 * TOKEN_BYTES
            fresh = prefilling.exposed("raw", "none", fresh=True)
            assert 0 < fresh["landing_bytes"] <= PROMPT.credit_chunks * agent._pool[1].buffer_bytes
            assert lone_frame(peer, "raw", "none")["kv_bytes"] == 4 << 20
        finally:
            peer.close()
        assert agent._pool[1].in_use == 0
