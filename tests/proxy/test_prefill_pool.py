"""Several prefill nodes: which one a request goes to, and what happens when one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from proxy import prefill_node
from proxy.estimates import Estimates
from proxy.ledger import Entry
from proxy.load import BLOCK_TOKENS
from proxy.placement import ranked
from proxy.policy import replay
from tests.proxy.conftest import SplitIsBest, Stack, free_port, make_cluster, running, serving, wait_until
from tests.proxy.fake_prefill import FakePrefill
from tests.proxy.test_failover import spell, told
from transfer.messages import Abort, Reserve

SPLIT, GPU = {"X-Isthmus-Route": "split"}, {"X-Isthmus-Route": "gpu"}
# Longer than a block of vLLM's prefix cache, and within the context.
LONG = "x" * (BLOCK_TOKENS + 20)


class Two(NamedTuple):
    """A stack with two prefill nodes."""

    stack: Stack
    fakes: dict[str, FakePrefill]

    def preferred(self, prompt: list[int]) -> list[str]:
        """The nodes' names as a request with a short prompt prefers them."""
        return ranked(prompt, list(self.stack.gateway.prefill))

    def served(self) -> list[str]:
        """Which node prefilled each request so far."""
        return [entry["prefill_node"] for entry in self.stack.entries()]


@contextmanager
def two_nodes(hf_dir: Path) -> Iterator[Two]:
    cluster = make_cluster(hf_dir)
    second = free_port()
    names = (f"127.0.0.1:{cluster.prefill.port}", f"127.0.0.1:{second}")
    cluster = msgspec.structs.replace(cluster, prefill=msgspec.structs.replace(cluster.prefill, nodes=names))
    fake = FakePrefill()
    with serving(fake.app, second), running(cluster) as stack:
        wait_until(lambda: all(node.up for node in stack.gateway.prefill))
        stack.gateway.dispatcher.planner.estimates = SplitIsBest()
        yield Two(stack, {names[0]: stack.prefill, names[1]: fake})
        stack.assert_idle()
        wait_until(lambda: not fake.open)


@pytest.fixture
def two(hf_dir: Path) -> Iterator[Two]:
    with two_nodes(hf_dir) as stack:
        yield stack


@pytest.fixture
def spelled(two: Two) -> Two:
    """All fakes say digits, spelled as their tokens."""
    vocabulary = two.stack.gateway.renderer.vocabulary
    spelling = {text: spell(text.encode(), vocabulary) for text in "0123456789"}
    two.stack.worker.script.spelling = spelling
    two.stack.worker.script.texts, two.stack.worker.script.first_text = ["2", "3"], "1"
    for fake in two.fakes.values():
        fake.script.spelling = spelling
        fake.script.first_text, fake.script.texts = "1", ["1", "2", "3"]
    return two


def test_prompts_that_begin_alike_go_to_the_same_node_and_others_elsewhere(two):
    prompts = [[number] * 20 for number in range(2, 18)]
    for prompt in prompts:
        for _ in range(2):
            assert two.stack.complete(SPLIT, prompt=prompt).status_code == 200
    assert two.served() == [two.preferred(prompt)[0] for prompt in prompts for _ in range(2)]
    assert set(two.served()) == set(two.fakes)
    assert sum(len(fake.bodies) for fake in two.fakes.values()) == 2 * len(prompts)


def test_the_node_that_has_the_prefix_is_preferred_to_the_one_of_the_hash(two):
    prompt = list(LONG.encode())
    first, second = two.preferred(prompt)
    two.stack.gateway.prefill.nodes[second].load.prefixes.add(prompt, "")
    two.stack.complete(SPLIT, prompt=prompt)
    two.stack.complete(SPLIT, prompt=[5, *prompt])
    assert two.served() == [second, two.preferred([5, *prompt])[0]]
    assert first in two.fakes


def test_requests_at_once_are_spread_over_the_nodes(two):
    """The first one hangs at its node, so that the next ones find work there."""
    prompt = [7] * 20
    first, second = two.preferred(prompt)
    load = two.stack.gateway.prefill.nodes[first].load
    work = load.backlog.begin(10**9)
    two.stack.complete(SPLIT, prompt=prompt)
    load.backlog.end(work)
    two.stack.complete(SPLIT, prompt=prompt)
    with ExitStack() as held:
        held.enter_context(load.holding(10, 1000))
        two.stack.complete(GPU, prompt=prompt)
    assert two.served() == [second, first, second]


def test_decisions_can_be_made_again_from_the_ledger(two):
    for number, headers in enumerate(({}, SPLIT, GPU, {"X-Isthmus-Route": "cpu"}) * 2):
        two.stack.complete(headers, prompt=[number % 3 + 5] * 20)
    for entry in two.stack.entries():
        decision = replay(entry["decision"])
        assert (decision.route, decision.worker) == (entry["route"], entry["worker"])
        assert entry["prefill_node"] == (None if entry["route"] == "cpu" else decision.prefill_node)
        attempt = entry["attempts"][-1]
        assert attempt["prefill_node"] == entry["prefill_node"]
        known = msgspec.convert(entry, Entry).decision
        assert known is not None
        assert {node.name for node in known.prefill_nodes} == set(two.fakes)


@pytest.mark.parametrize("broken", [{"refuse": (500, "dead engine")}, {"export": {"error": "no room"}}])
def test_another_node_prefills_where_one_fails(spelled, broken):
    prompt = [7] * 20
    first, second = spelled.preferred(prompt)
    for name, value in broken.items():
        setattr(spelled.fakes[first].script, name, value)
    answer = spelled.stack.complete(SPLIT, prompt=prompt, max_tokens=9).json()
    assert answer["choices"][0]["text"] == "123"
    (entry,) = spelled.stack.entries()
    assert [(each["route"], each["prefill_node"]) for each in entry["attempts"]] == [
        ("split", first),
        ("split", second),
    ]
    assert (entry["reason"], entry["prefill_node"], entry["status"]) == ("failed_over", second, "ok")
    reserves = spelled.stack.worker.heard(Reserve)
    assert [each.source for each in reserves] == ["kv", "kv"]
    wait_until(lambda: spelled.stack.worker.heard(Abort))
    assert spelled.stack.worker.heard(Abort)[0].request_id == reserves[0].request_id


def test_the_worker_computes_the_prompt_where_all_nodes_fail(spelled):
    for fake in spelled.fakes.values():
        fake.script.refuse = (500, "dead engine")
    assert told(spelled.stack.chat(stream=True)) == "123"
    (entry,) = spelled.stack.entries()
    assert [each["route"] for each in entry["attempts"]] == ["split", "split", "cpu"]
    assert {each["prefill_node"] for each in entry["attempts"]} == {*spelled.fakes, None}


def test_a_stream_goes_on_at_another_node_behind_the_tokens_that_the_client_has(spelled):
    prompt = [7] * 20
    first, second = spelled.preferred(prompt)
    spelled.fakes[first].script.texts = ["1", "2"]
    spelled.fakes[first].script.fail_in_stream = True
    spelled.fakes[second].script.texts = ["3", "4"]
    answer = spelled.stack.complete(GPU, prompt=prompt, max_tokens=9).json()
    assert answer["choices"][0]["text"] == "1234"
    (body,) = spelled.fakes[second].bodies
    spelling = spelled.fakes[second].script.spelling
    assert body["prompt"] == prompt + spelling["1"] + spelling["2"]
    (entry,) = spelled.stack.entries()
    assert [each["prefill_node"] for each in entry["attempts"]] == [first, second]
    assert [each["completion_tokens"] for each in entry["attempts"]] == [2, 2]


def test_a_node_that_fails_again_and_again_is_left_out_and_comes_back(spelled):
    prompt = [7] * 20
    first, second = spelled.preferred(prompt)
    spelled.fakes[first].script.refuse = (500, "dead engine")
    for _ in range(3):
        assert spelled.stack.complete(GPU, prompt=prompt).status_code == 200
    view = spelled.stack.http.get("/nodes").json()["prefill_nodes"]
    assert (view[first]["state"], view[second]["state"]) == ("failing", "up")
    assert spelled.stack.http.get("/health").json()["prefill_nodes"] == {first: "failing", second: "up"}
    seen = len(spelled.fakes[first].bodies)
    assert spelled.stack.complete(GPU, prompt=prompt).status_code == 200
    assert len(spelled.fakes[first].bodies) == seen
    spelled.fakes[first].script.refuse = None
    node = spelled.stack.gateway.prefill.nodes[first]
    wait_until(lambda: node.state == "up")
    spelled.stack.complete(GPU, prompt=prompt)
    assert spelled.served()[-1] == first
    assert not node.breaker.failing(0)


def test_a_node_that_is_down_gets_nothing_until_it_is_back(hf_dir, monkeypatch):
    monkeypatch.setattr(prefill_node, "HEARTBEAT_S", 0.05)
    cluster = make_cluster(hf_dir)
    second = free_port()
    name = f"127.0.0.1:{second}"
    nodes = (f"127.0.0.1:{cluster.prefill.port}", name)
    cluster = msgspec.structs.replace(cluster, prefill=msgspec.structs.replace(cluster.prefill, nodes=nodes))
    prompts = [[number] * 20 for number in range(2, 18)]
    with running(cluster) as stack:
        both = Two(stack, {nodes[0]: stack.prefill})
        for prompt in prompts:
            assert stack.complete(GPU, prompt=prompt).status_code == 200
        assert set(both.served()) == {nodes[0]}
        health = stack.http.get("/health").json()
        assert (health["prefill"], health["prefill_nodes"][name]) == ("up", "down")
        assert f'isthmus_prefill_node_up{{node="{name}"}} 0.0' in stack.http.get("/metrics").text
        fake = FakePrefill()
        with serving(fake.app, second):
            wait_until(lambda: stack.gateway.prefill.nodes[name].up)
            for prompt in prompts:
                assert stack.complete(GPU, prompt=prompt).status_code == 200
        assert fake.bodies
        assert set(both.served()) == set(nodes)


def test_costs_are_learned_for_each_node(two):
    estimates = two.stack.gateway.dispatcher.planner.estimates = Estimates()
    prompts = [[number] * 20 for number in range(2, 10)]
    for prompt in prompts:
        two.stack.complete(GPU, prompt=prompt)
    counts = {name: two.served().count(name) for name in two.fakes}
    for name, count in counts.items():
        cost = estimates.vllm(name).prefill.cost
        assert (cost.samples if cost else 0) == count
    view = two.stack.http.get("/nodes").json()
    assert set(view["prefill_nodes"]) == set(two.fakes)
    assert view["prefill"] == view["prefill_nodes"][next(iter(two.fakes))]


def test_prompts_are_scored_by_the_node_that_was_chosen(two):
    prompt = [7] * 20
    answer = two.stack.complete(SPLIT, prompt=prompt, prompt_logprobs=1)
    assert answer.status_code == 200
    bodies = two.fakes[two.preferred(prompt)[0]].bodies
    assert [body.get("prompt_logprobs") for body in bodies] == [1, None]
