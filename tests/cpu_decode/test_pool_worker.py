"""A real worker with tiers below RAM: what comes back gives the answers that were given before, or is not used."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from cpu_decode.pool import block_files
from cpu_decode.pool.opened import seed_of
from tests.cpu_decode.pool.stored_blocks import redis_server
from tests.cpu_decode.serving import Running, serving
from tests.cpu_decode.test_prefix_reuse import LONG, Prefilled, ask
from tests.cpu_decode.test_worker import GREEDY, prompt_of
from tests.cpu_decode.test_worker import eventually as soon
from transfer.config import Decode
from transfer.messages import Abort, IndexUpdate, Ping, Reserve, Status, Ticket, TierStatus

# Three full blocks, and the token whose logits are wanted.
LENGTH = 193
BYTES_PER_TOKEN = 2 * 30 * 3 * 128


def eventually(check) -> None:
    soon(check, 60)


def tier(running: Running, name: str) -> TierStatus:
    return next(tier for tier in running.client.status().tiers if tier.name == name)


def on_disk(folder: Path, **more: object) -> dict[str, object]:
    return {"pool_mib": 64, "disk_pool_dir": str(folder), "disk_pool_mib": 64} | more


@pytest.fixture(scope="module")
def kvs(model, geometry) -> list[Prefilled]:
    from cpu_decode.llama import Context

    context = Context(model, num_cells=512, max_sequences=1, batch_tokens=512, threads=1, cell_type="bf16")
    made = [Prefilled(context, geometry, prompt_of(LENGTH, salt=500 + number)) for number in range(4)]
    context.close()
    return made


@pytest.fixture
def reading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is read however fast KV comes over the wire here, and waited for as long as for anything."""
    monkeypatch.setattr("cpu_decode.fetching.Fetching._tokens_per_s", lambda *_: 1.0)


@pytest.mark.usefixtures("reading_pays")
def test_kv_on_disk_survives_a_restart_and_damage(model, geometry, kvs, tmp_path):
    with serving(model, geometry, "bf16", **on_disk(tmp_path)) as running:
        fresh = [ask(running, kv)[0] for kv in kvs[:3]]
        # The prompt's and, of the prompt and its answer, the same ones again.
        eventually(lambda: tier(running, "disk").blocks == 9)
    torn, flipped = (block_files.path_of(tmp_path / "0", name) for name in names(running, kvs[1])[1:])
    torn.write_bytes(torn.read_bytes()[:-100])
    data = bytearray(flipped.read_bytes())
    data[5000] ^= 1
    flipped.write_bytes(data)
    with serving(model, geometry, "bf16", **on_disk(tmp_path)) as running:
        eventually(lambda: tier(running, "disk").blocks == 8)
        again, last = ask(running, kvs[0])
        assert (again, last.report.kv_reused_tokens, last.report.restored_tokens) == (fresh[0], 192, 192)
        assert last.report.restore_ns > 0
        # Only what is missing is on the wire.
        assert last.report.kv_raw_bytes == BYTES_PER_TOKEN
        found = tier(running, "disk")
        assert (found.hits, found.hit_tokens, found.corrupt_blocks) == (1, 192, 1)
        assert found.read_bytes_per_s > 0
        again, last = ask(running, kvs[1])
        assert (again, last.report.kv_reused_tokens) == (fresh[1], 64)
        assert last.report.kv_raw_bytes == (LENGTH - 64) * BYTES_PER_TOKEN
        # What was damaged has been written anew.
        eventually(lambda: tier(running, "disk").blocks == 9)
        # From RAM, now that it is there.
        again, last = ask(running, kvs[0])
        assert (again, last.report.kv_reused_tokens) == (fresh[0], 192)
        assert tier(running, "ram").hit_tokens == 192
        data = bytearray(block_files.path_of(tmp_path / "0", names(running, kvs[2])[0]).read_bytes())
        data[-1] ^= 1
        block_files.path_of(tmp_path / "0", names(running, kvs[2])[0]).write_bytes(data)
        again, last = ask(running, kvs[2])
        assert (again, last.report.kv_reused_tokens) == (fresh[2], 0)
        assert tier(running, "disk").corrupt_blocks == 2


def names(running: Running, kv: Prefilled) -> list[bytes]:
    return running.worker._promised.prefixes._names(kv.prompt, "", "")


@pytest.mark.usefixtures("reading_pays")
def test_tenants_and_requests_without_reuse_find_nothing_below_and_leave_nothing(model, geometry, kvs, tmp_path):
    prompt = kvs[0].prompt

    def reused(running: Running, **more: object) -> int:
        ticket = running.client.reserve(prompt, msgspec.structs.replace(GREEDY, max_tokens=2), "local", **more)
        running.client.start(ticket)
        running.client.collect(ticket)
        return ticket.reused_tokens

    with serving(model, geometry, "bf16", **on_disk(tmp_path)) as running:
        assert reused(running, reuse=False) == 0
        assert reused(running, tenant="a") == 0
        assert reused(running, tenant="a") == 192
        assert reused(running, reuse=False) == 0
        assert reused(running) == 0
        eventually(lambda: tier(running, "disk").blocks == 6)
        empty_ram(running)
        assert [reused(running, **more) for more in ({"reuse": False}, {"tenant": "b"})] == [0, 0]
        assert [reused(running, **more) for more in ({"tenant": "a"}, {})] == [192, 192]
        assert tier(running, "disk").hits == 2
        the_index_says_what_is_where(running, prompt)


def the_index_says_what_is_where(running: Running, prompt: list[int]) -> None:
    def index(version: int) -> IndexUpdate:
        found = running.client.ask(Ping(index_version=version))
        assert isinstance(found, Status)
        assert found.index is not None
        return found.index

    known = running.worker._promised.prefixes
    for tenant in ("", "a", "b"):
        assert {name[:8] for name in known._names(prompt, "", tenant)} <= set(index(0).added["ram"])
    version = index(0).version
    assert index(version) == IndexUpdate(base_version=version, version=version)
    empty_ram(running)
    changed = index(version)
    # What has left RAM is on disk, where it got that far.
    assert (set(changed.added), changed.base_version) == ({"disk"}, version)
    assert len(changed.added["disk"]) == tier(running, "disk").blocks
    assert running.client.status().index is None


def empty_ram(running: Running) -> None:
    """Let all blocks go, as if others had taken their place; nothing runs."""
    eventually(lambda: not running.client.status().reserved_sequences)
    tree = running.worker._promised.prefixes._tree
    for block in list(tree._blocks):
        tree.discard(block)


@pytest.mark.usefixtures("reading_pays")
def test_another_worker_goes_on_from_the_shared_server_while_the_first_still_answers(model, geometry, kvs, tmp_path):
    with redis_server(tmp_path) as server:
        settings = {"pool_mib": 64, "shared_pool_url": server.url}
        with (
            serving(model, geometry, "bf16", **settings) as first,
            serving(model, geometry, "bf16", **settings) as second,
        ):
            fresh, _ = ask(first, kvs[1])
            ticket = first.client.reserve(kvs[0].prompt, LONG, "kv")
            kvs[0].send(first, ticket)
            first.client.start(ticket)
            first.client.next_tokens(ticket)
            # It is there before the answer has ended: its worker may be killed now.
            eventually(lambda: tier(first, "shared").blocks >= 6)
            other = second.client.reserve(kvs[0].prompt, GREEDY, "kv")
            assert other.reused_tokens == 192
            second.client.abort(other)
            first.client.abort(ticket)
            again, last = ask(second, kvs[1])
            assert (again, last.report.kv_raw_bytes) == (fresh, BYTES_PER_TOKEN)
            assert tier(second, "shared").hit_tokens == 2 * 192
            # It goes away: the next prompt is sent whole, and answered.
            server.kill()
            _, last = ask(second, kvs[2])
            assert last.report.kv_reused_tokens == 0


class Stalled:
    """A worker whose disk does not answer until it is told to."""

    def __init__(self, running: Running) -> None:
        (self.tier,) = running.worker._promised.prefixes.below.tiers
        self.may_go_on = threading.Event()
        self._get = self.tier.get
        self.tier.get = self.get

    def get(self, names):
        self.may_go_on.wait(30)
        return self._get(names)


def test_a_disk_that_stalls_costs_no_more_than_it_could_save(model, geometry, kvs, tmp_path):
    with serving(model, geometry, "bf16", **on_disk(tmp_path)) as running:
        fresh, _ = ask(running, kvs[0])
        eventually(lambda: tier(running, "disk").blocks == 3)
        empty_ram(running)
        stalled = Stalled(running)
        # One that is aborted while it waits gets no ticket and keeps nothing.
        reserve = Reserve(request_id="gone", prompt=kvs[0].prompt, sampling=GREEDY, source="kv")
        running.client.send(reserve)
        running.client.send(Abort(request_id="gone"))
        began = time.monotonic()
        again, last = ask(running, kvs[0])
        assert (again, last.report.kv_reused_tokens) == (fresh, 0)
        assert time.monotonic() - began < 20
        # What comes late is dropped.
        stalled.may_go_on.set()
        eventually(lambda: not running.worker._promised.fetching)
        assert all(message.request_id != "gone" for message in running.client._early if isinstance(message, Ticket))
        eventually(lambda: running.client.status().reserved_sequences == 0)


def test_a_changed_model_file_and_other_cells_have_another_seed(geometry, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    kept = Decode(disk_pool_dir=str(tmp_path), disk_pool_mib=1)
    before = seed_of(kept, geometry, "half", gguf)
    assert before == seed_of(kept, geometry, "half", gguf)
    assert before != seed_of(msgspec.structs.replace(kept, cell_type="bf16"), geometry, "half", gguf)
    gguf.write_bytes(b"Weights")
    assert before != seed_of(kept, geometry, "half", gguf)


def test_a_worker_that_keeps_nothing_in_ram_keeps_nothing_below(tmp_path):
    from cpu_decode.pool.block_log import BlockLog
    from cpu_decode.pool.opened import open_tiers

    assert not open_tiers(Decode(disk_pool_dir=str(tmp_path), disk_pool_mib=1, pool_mib=0), b"seed", BlockLog())
    assert not list(tmp_path.iterdir())
