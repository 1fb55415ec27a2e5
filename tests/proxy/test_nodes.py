"""Several decode workers: how the proxy learns of them, which it chooses, and how they leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from cpu_decode.announce import Announcer
from proxy import nodes
from proxy.registry import Registry
from tests.proxy.conftest import Stack, free_port, make_cluster, running, wait_until
from tests.proxy.fake_worker import FakeWorker
from tests.proxy.workers import announce, announced
from transfer import keys
from transfer.doorkeeper import Doorkeeper
from transfer.errors import ConfigError
from transfer.messages import Announce, Ping, Reserve, encode

CPU = {"X-Isthmus-Route": "cpu"}


@pytest.fixture
def two(hf_dir) -> Iterator[tuple[Stack, FakeWorker]]:
    with running(make_cluster(hf_dir)) as stack, announced(stack) as second:
        yield stack, second


def metric(stack: Stack, name: str, worker: str) -> float:
    line = f'{name}{{worker="{worker}"}}'
    return next(float(row.split()[-1]) for row in stack.http.get("/metrics").text.splitlines() if row.startswith(line))


def test_every_worker_is_shown_by_name(two):
    stack, second = two
    pinned = stack.gateway.workers.pinned.name
    assert stack.http.get("/health").json()["workers"] == {pinned: "up", second.name: "up"}
    view = stack.http.get("/nodes").json()
    assert set(view["workers"]) == {pinned, second.name}
    assert view["workers"][second.name]["status"]["worker"] == second.name
    assert view["decode"] == view["workers"][pinned]
    for name in (pinned, second.name):
        assert metric(stack, "isthmus_worker_up", name) == 1
        assert metric(stack, "isthmus_worker_num_cells", name) == 1000


def test_requests_spread_and_their_like_stay_together(two):
    stack, second = two
    chosen = {}
    for _ in range(2):
        for number in range(12):
            stack.complete(CPU, prompt=[5, number])
            worker = stack.entries()[-1]["worker"]
            assert chosen.setdefault(number, worker) == worker
    assert set(chosen.values()) == {stack.gateway.workers.pinned.name, second.name}
    assert len(second.heard(Reserve)) == 2 * list(chosen.values()).count(second.name)


def test_a_worker_that_drains_gets_nothing_more(two):
    stack, second = two
    second.script.draining = True
    wait_until(lambda: stack.gateway.workers.nodes[second.name].draining)
    for number in range(8):
        assert stack.complete(CPU, prompt=[5, number]).status_code == 200
    assert not second.heard(Reserve)
    assert stack.http.get("/health").json()["workers"][second.name] == "draining"
    stack.worker.script.draining = True
    wait_until(lambda: not stack.gateway.workers.up)
    assert stack.complete(CPU).status_code == 503
    assert "about to end" in stack.gateway.workers.down_reason
    assert stack.complete().headers["x-isthmus-route"] == "gpu"


def test_draining_is_heard_from_the_registry_too(two):
    stack, second = two
    node = stack.gateway.workers.nodes[second.name]
    said = Announce(worker=second.name, control_endpoint=node.endpoint, draining=True)
    announce(stack, said)
    wait_until(lambda: node.draining)
    announce(stack, msgspec.structs.replace(said, draining=False))
    wait_until(lambda: not node.draining)


def test_a_worker_that_is_gone_is_forgotten(two, monkeypatch):
    stack, second = two
    monkeypatch.setattr(nodes, "EXPIRE_S", 0.1)
    # Silence alone is no reason: its session stands.
    time.sleep(2 * nodes.SWEEP_S)
    assert second.name in stack.gateway.workers.nodes
    second.close()
    wait_until(lambda: second.name not in stack.gateway.workers.nodes)
    assert stack.complete(CPU).status_code == 200


def test_the_pinned_worker_stays_and_is_not_known_twice(hf_dir, monkeypatch):
    monkeypatch.setattr(nodes, "EXPIRE_S", 0.1)
    cluster = make_cluster(hf_dir)
    with running(cluster) as stack:
        pinned = stack.gateway.workers.pinned
        # By the name in the cluster file, and by the one that it gives itself.
        for name in (pinned.name, "fake"):
            announce(stack, Announce(worker=name, control_endpoint="tcp://127.0.0.1:1"))
        announce(stack, Announce(worker="other", control_endpoint="tcp://127.0.0.1:1"))
        wait_until(lambda: "other" in stack.gateway.workers.nodes)
        wait_until(lambda: "other" not in stack.gateway.workers.nodes)
        assert list(stack.gateway.workers.nodes) == [pinned.name]
        stack.worker.close()
        wait_until(lambda: not pinned.up)
        time.sleep(2 * nodes.SWEEP_S)
        assert list(stack.gateway.workers.nodes) == [pinned.name]


def test_the_pinned_worker_under_another_address_is_found_out(hf_dir):
    with running(make_cluster(hf_dir)) as stack:
        pinned = stack.gateway.workers.pinned
        announce(stack, Announce(worker="alias", control_endpoint=pinned.endpoint))
        wait_until(lambda: "alias" in stack.gateway.workers.nodes)
        wait_until(lambda: "alias" not in stack.gateway.workers.nodes)
        assert pinned.up
        assert stack.complete(CPU).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xc1",
        encode(Ping()),
        encode(Announce(worker="w", control_endpoint="ipc:///tmp/x")),
        encode(Announce(worker="w", control_endpoint="tcp://127.0.0.1:1", protocol=99)),
    ],
)
def test_what_is_no_announcement_changes_nothing(stack, said):
    announce(stack, said)
    assert list(stack.gateway.workers.nodes) == [stack.gateway.workers.pinned.name]
    assert stack.complete(CPU).status_code == 200


def test_no_more_workers_than_there_is_room_for(hf_dir, monkeypatch):
    monkeypatch.setattr(nodes, "MAX_WORKERS", 2)
    with running(make_cluster(hf_dir)) as stack:
        for name in ("a", "b", "c"):
            announce(stack, Announce(worker=name, control_endpoint="tcp://127.0.0.1:1"))
        wait_until(lambda: len(stack.gateway.workers.nodes) == 2)
        time.sleep(0.2)
        assert len(stack.gateway.workers.nodes) == 2


def test_workers_alone_are_enough(hf_dir):
    """The cluster file pins none."""
    cluster = make_cluster(hf_dir)
    cluster = msgspec.structs.replace(cluster, decode=msgspec.structs.replace(cluster.decode, control_port=0))
    with running(cluster, decode_up=False) as stack:
        assert stack.gateway.workers.pinned is None
        assert stack.http.get("/nodes").json()["decode"] is None
        assert stack.chat(CPU).status_code == 503
        assert "no decode worker has announced itself" in stack.gateway.workers.down_reason
        with announced(stack) as worker:
            assert stack.chat().headers["x-isthmus-route"] == "split"
            assert stack.entries()[-1]["worker"] == worker.name


def test_a_port_that_is_taken_is_named():
    async def listen(port: int) -> None:
        Registry("127.0.0.1", port, None, lambda _: None)

    with zmq.Context() as context, context.socket(zmq.ROUTER) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ConfigError, match=r"\[proxy\] registry_port"):
            asyncio.run(listen(port))


@pytest.mark.parametrize("role", ["proxy", "prefill", None])
def test_only_proxies_hear_workers_and_only_workers_are_heard(role, tmp_path):
    keys.make(tmp_path)
    server = keys.server(tmp_path)
    heard: list[Announce] = []

    async def listen(port: int, seconds: float) -> None:
        registry = Registry("127.0.0.1", port, keys.client(tmp_path, role) if role else None, heard.append)
        listening = asyncio.create_task(registry.run())
        with zmq.Context() as context:
            doorkeeper = Doorkeeper(context, server)
            announcer = Announcer(context, f"tcp://127.0.0.1:{port}", server)
            try:
                for _ in range(int(seconds / 0.02)):
                    announcer.turn(Announce(worker="w", control_endpoint="tcp://127.0.0.1:1"))
                    await asyncio.sleep(0.02)
                    if heard:
                        break
            finally:
                announcer.close()
                doorkeeper.close()
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    asyncio.run(listen(free_port(), 10 if role == "proxy" else 1))
    assert [said.worker for said in heard] == (["w"] if role == "proxy" else [])


def test_a_stranger_is_not_heard(tmp_path):
    """Who does not hold the workers' key, with keys of his own or none."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    keys.make(ours)
    keys.make(theirs)
    heard: list[Announce] = []

    async def listen(port: int) -> None:
        registry = Registry("127.0.0.1", port, keys.client(ours, "proxy"), heard.append)
        listening = asyncio.create_task(registry.run())
        with zmq.Context() as context:
            doorkeeper = Doorkeeper(context, keys.server(theirs))
            strangers = [Announcer(context, f"tcp://127.0.0.1:{port}", own) for own in (keys.server(theirs), None)]
            for _ in range(25):
                for stranger in strangers:
                    stranger.turn(Announce(worker="w", control_endpoint="tcp://127.0.0.1:1"))
                await asyncio.sleep(0.02)
            for stranger in strangers:
                stranger.close()
            doorkeeper.close()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

    asyncio.run(listen(free_port()))
    assert not heard
