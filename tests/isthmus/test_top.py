from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from isthmus import top, top_view
from proxy.api_keys import make
from tests.dashboard.entries import varied
from tests.proxy.conftest import Stack, free_port, hf_dir, make_cluster, running, wait_until  # noqa: F401 - a fixture
from transfer.errors import LinkError, RequestError

RETRY_S = 0.05
MOST_EVENTS = 500


def text(watched: top.Watched, height: int = 50, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    console.print(watched.render(height, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def hear(watched: top.Watched, said: Iterator[top.Said], kind: str) -> None:
    """Take things in up to the first of that kind."""
    for each in islice(said, MOST_EVENTS):
        watched.take(each)
        if each.kind == kind:
            return
    raise AssertionError(f"no {kind}")


@pytest.fixture(scope="module")
def stack(hf_dir: Path) -> Iterator[Stack]:  # noqa: F811
    with running(make_cluster(hf_dir)) as up:
        yield up


def test_nodes_requests_and_totals(stack: Stack) -> None:
    watched = top.Watched(stack.url)
    stack.chat({"X-Isthmus-Route": "split"})
    said = top.follow(stack.url, None, RETRY_S)
    hear(watched, said, "nodes")
    shown = text(watched)
    (entry,) = stack.entries()[-1:]
    assert "live" in shown
    assert entry["request_id"][:12] in shown
    assert next(iter(stack.gateway.workers.nodes)) in shown
    assert "0/1,000" in shown
    stack.chat({"X-Isthmus-Route": "gpu"})
    hear(watched, said, "entry")
    assert [each["route"] for each in watched.entries] == [each["route"] for each in stack.entries()]
    said.close()  # type: ignore[attr-defined]


def test_a_proxy_that_goes_away_and_comes_back(hf_dir: Path) -> None:  # noqa: F811
    cluster = make_cluster(hf_dir)
    watched = top.Watched("there")
    with running(cluster) as stack:
        stack.chat()
        said = top.follow(stack.url, None, RETRY_S)
        hear(watched, said, "nodes")
    hear(watched, said, "lost")
    assert "not heard" in text(watched)
    assert len(watched.entries) == 1
    with running(cluster) as stack:
        hear(watched, said, "nodes")
        assert "live" in text(watched)
        stack.chat()
        hear(watched, said, "entry")
        assert len(watched.entries) == 2
        said.close()  # type: ignore[attr-defined]


def test_a_key_is_needed_and_sent(hf_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    key = make(tmp_path / "keys", "me")
    with running(make_cluster(hf_dir, api_keys_file=str(tmp_path / "keys"))) as stack:  # type: ignore[arg-type]
        for wrong in (None, "wrong"):
            with pytest.raises(RequestError, match="--api-key"):
                next(top.follow(stack.url, wrong))
        assert next(top.follow(stack.url, key)).kind == "nodes"


def test_where_nobody_watches_a_dead_proxy_is_an_error() -> None:
    with pytest.raises(LinkError, match="no word from the proxy"):
        top.run(f"http://127.0.0.1:{free_port()}", None)


def test_where_nobody_watches_one_picture_is_printed(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    top.run(stack.url, None)
    assert "live" in capsys.readouterr().out


def test_five_hundred_entries_fit_the_screen(stack: Stack) -> None:
    stack.chat({"X-Isthmus-Route": "split"})
    watched = top.Watched(stack.url)
    for entry in varied(stack.gateway.ledger.last(1)[0], 600):
        watched.take(top.Said("entry", msgspec.to_builtins(entry)))
    assert len(watched.entries) == 500
    shown = text(watched, height=40)
    assert shown.count("\n") <= 40
    assert "varied-599" in shown
    gains = [entry["specialization_gain_ns"] for entry in watched.entries if entry["codec"] == "raw"]
    assert top_view.duration(sum(gains), sign=True) in shown


def full(stack: Stack) -> top.Watched:
    """As much as a worker can say, of two that it can say it of."""
    stack.chat({"X-Isthmus-Route": "split"})
    watched = top.Watched(stack.url)
    for entry in varied(stack.gateway.ledger.last(1)[0], 30):
        watched.take(top.Said("entry", msgspec.to_builtins(entry)))
    view = stack.http.get("/nodes").json()
    (worker,) = view["workers"].values()
    worker["status"] |= {
        "used_cells": 12_345,
        "num_cells": 16_384,
        "decode_tokens_per_s": 81.0,
        "step_read_bytes_per_s": 9e9,
        "memory_bytes_per_s": 20e9,
        "package_watts": 85.0,
        "dram_watts": 10.0,
    }
    down = worker | {"up": False, "state": "down", "down_reason": "it does not answer " * 9}
    view["prefill"]["power"] = {"watts": 213.4, "of": "gpu 0"}
    watched.take(top.Said("nodes", view | {"workers": {"192.168.1.20:8102": worker, "192.168.1.20:8112": down}}))
    way = {"route": "split", "requests": 123_456, "gained_ns": 9 * 10**12, "lost_ns": -(10**10)}
    watched.take(top.Said("totals", {"seq": 1, "since": "2026-11-25T12:00:00.000+00:00", "ways": [way]}))
    return watched


def test_eighty_columns_are_enough(stack: Stack) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(full(stack).render(40, 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 40
    assert all(len(line.rstrip()) <= 80 for line in lines)
    # Only the reason is longer than its line.
    assert [line[:17] for line in lines if "…" in line] == ["192.168.1.20:8112"]
    (worker,) = (line.split() for line in lines if line.startswith("192.168.1.20:8102"))
    assert worker == ["192.168.1.20:8102", "up", "12,345/16,384", *worker[3:5], "81.0", "45%", "95", "W", "1.2"]
    assert "123,456 requests since 2026-11-25 12:00" in lines[-2]
    assert "net +8,990 s" in " ".join(lines[-2:])


def test_power_is_named_only_where_it_is_known(stack: Stack) -> None:
    watched = full(stack)
    assert "213 W" in text(watched)
    assert watched.nodes is not None
    watched.nodes["prefill"]["power"] = None
    for worker in watched.nodes["workers"].values():
        worker["status"] |= {"package_watts": None}
    shown = text(watched)
    assert "power" not in shown
    assert " W" not in shown


def test_several_prefill_nodes_have_a_line_each(stack: Stack) -> None:
    watched = full(stack)
    assert watched.nodes is not None
    (one,) = watched.nodes["prefill_nodes"].values()
    down = one | {"up": False, "state": "down", "down_reason": "connection refused"}
    watched.nodes["prefill_nodes"] = {"10.10.0.1:8101": one, "10.10.0.3:8101": down}
    shown = text(watched, width=140)
    assert "prefill 10.10.0.1:8101" in shown
    assert "prefill 10.10.0.3:8101: connection refused" in shown


@pytest.mark.parametrize(
    ("ns", "said"),
    [(None, "-"), (0, "0.0 ms"), (1_234_567, "1.2 ms"), (123e6, "123 ms"), (1.5e9, "1.50 s"), (61e9, "61.0 s")],
)
def test_durations_are_short(ns: float | None, said: str) -> None:
    assert top_view.duration(ns) == said
    if ns:
        assert top_view.duration(ns, sign=True) == f"+{said}"
        assert top_view.duration(-ns, sign=True) == f"-{said}"


def test_bars_are_as_long_as_their_stages() -> None:
    stages = {f"{stage}_ns": 10**9 for stage in top_view.STAGES}
    whole = top_view.bar(stages, 7 * 10**9)
    assert len(whole) == top_view.BAR_CELLS
    assert len(whole.spans) == len(stages)
    assert len(top_view.bar(stages, 14 * 10**9)) == top_view.BAR_CELLS // 2
    assert len(top_view.bar({}, 0)) == 0


def test_names_cannot_command_the_terminal_or_be_markup(stack: Stack) -> None:
    strange = "[red]x[/red]\x1b[2J\x07"
    watched = top.Watched(strange)
    stack.chat()
    entry = msgspec.to_builtins(stack.gateway.ledger.last(1)[0])
    watched.take(top.Said("entry", entry | {"request_id": strange, "status": strange, "codec": strange}))
    worker = {"up": False, "state": strange, "down_reason": strange, "status": None}
    down = {"up": False, "state": "down", "down_reason": strange}
    watched.take(top.Said("nodes", {"prefill": down, "workers": {strange: worker}}))
    watched.take(top.Said("lost", strange))
    shown = text(watched, width=400)
    assert "[red]x" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
