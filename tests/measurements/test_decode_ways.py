from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from cpu_decode import numa
from measurements import decode, decode_tune
from measurements.decode_ways import bench_rate, server_rate, steady_rate, whole_rate
from transfer.errors import EngineError


class Said(NamedTuple):
    """As much of llama.cpp's programs as is run."""

    batched_bench: Path
    server: Path
    environment: dict[str, str]


def bench(folder: Path, script: str) -> Said:
    program = folder / "bench"
    program.write_text(f"#!{sys.executable}\nimport pathlib, sys, time\n{script}")
    program.chmod(0o755)
    return Said(program, program, {})


def test_the_bench_stands_still_where_it_has_said_a_rate(tmp_path: Path) -> None:
    programs = bench(
        tmp_path,
        f"""
for count in (1, 4):
    print("noise")
    print('{{"pl": %d, "speed_tg": %d.5}}' % (count, count), flush=True)
    time.sleep(0.2)
    pathlib.Path({str(tmp_path)!r}, f"done {{count}}").touch()
""",
    )
    with bench_rate(decode.setting(None, "1,4", 60, 24), programs, (1, 4)) as rate:
        assert rate(1) == 1.5
        time.sleep(0.5)
        assert not (tmp_path / "done 1").exists()
        assert rate(4) == 4.5
        assert (tmp_path / "done 1").exists()


def test_a_bench_that_fails_says_why(tmp_path: Path) -> None:
    programs = bench(tmp_path, "sys.exit('no memory for cells')")
    with (
        bench_rate(decode.setting(None, "1", 60, 24), programs, (1,)) as rate,
        pytest.raises(EngineError, match="llama-batched-bench failed: no memory for cells"),
    ):
        rate(1)


def test_their_threads_are_pinned_where_ours_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = bench(tmp_path, "import os; sys.exit('pinned to ' + os.environ.get('GOMP_CPU_AFFINITY', 'none'))")
    setting = decode.setting(None, "1", 60, 24)._replace(threads=2)
    node = numa.Node(0, ((0, 4), (1, 5)), 1, 1, {0: 10})

    def bench_says() -> str:
        with bench_rate(setting, programs, (1,)) as rate, pytest.raises(EngineError) as failure:
            rate(1)
        return str(failure.value)

    def server_flags(*, defaults: bool = False) -> str:
        starting = server_rate(setting, programs, defaults=defaults)
        with pytest.raises(EngineError, match="llama-server did not start") as failure, starting:
            pass
        return str(failure.value)

    monkeypatch.setattr(numa, "read_topology", lambda: (node,))
    assert "pinned to 0 1" in bench_says()
    assert "--cpu-mask 0x3 --cpu-strict 1" in server_flags()
    assert "--cpu" not in server_flags(defaults=True)
    monkeypatch.setattr(numa, "read_topology", lambda: (node._replace(cores=((0,), (1,), (2,))),))
    assert "pinned to none" in bench_says()
    assert "--cpu" not in server_flags()


def test_rate_counts_only_the_time_in_which_all_streams_run() -> None:
    early = [(second * 10**9, 1) for second in range(21)]
    late = [(second * 10**9, 2) for second in range(10, 31)]
    # Between second 10 and second 20: 10 tokens of the one, 20 of the other.
    assert steady_rate([early, late]) == pytest.approx(3.0)
    with pytest.raises(EngineError, match="did not run at the same time; raise --tokens"):
        steady_rate([early[:5], late])


def test_a_whole_rate_counts_waiting_too() -> None:
    first = [(second * 10**9, 1) for second in range(2, 6)]
    waited = [(second * 10**9, 2) for second in range(6, 11)]
    assert whole_rate(10**9, [first, waited]) == pytest.approx((4 + 10) / 9)


# One slot, tokens every 20 ms; of a prompt it computes what TOKENS says when it is asked again.
SERVER = """
import json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
slot, seen = threading.Lock(), set()
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"total_slots": 1}')
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["id_slot"] == -1
        self.send_response(200); self.end_headers()
        prompt = tuple(asked["prompt"])
        computed = TOKENS if prompt in seen else len(prompt)
        seen.add(prompt)
        with slot:
            for _ in range(asked["n_predict"]):
                time.sleep(0.02)
                self.wfile.write(b'data: {"tokens": [7]}\\n\\n')
            self.wfile.write(b'data: ' + json.dumps({"timings": {"prompt_n": computed}}).encode() + b'\\n\\n')
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def test_sequences_for_which_a_server_has_no_slots_take_turns(tmp_path: Path) -> None:
    setting = decode.setting(None, "1,2", 60, 8)
    programs = bench(tmp_path, SERVER.replace("TOKENS", "1"))
    with server_rate(setting, programs, defaults=True, slot_for_each=False) as rate:
        # As fast as one after the other, not as if both ran at once.
        assert 0 < rate(2) <= 50


def test_a_server_that_forgets_prompts_is_not_taken_for_a_slow_one(tmp_path: Path) -> None:
    setting = decode.setting(None, "1,2", 60, 8)
    programs = bench(tmp_path, SERVER.replace("TOKENS", "60"))
    with (
        server_rate(setting, programs, defaults=True, slot_for_each=False) as rate,
        pytest.raises(EngineError, match="computed prompts again that it was to keep; lower --tokens"),
    ):
        rate(2)


def test_streams_have_room_for_every_sequence(default_pair) -> None:
    setting = decode.setting(default_pair.gguf, "1,16", 900, 64)
    assert setting.room_for(setting.decode).num_cells == setting.num_cells
    in_streams = setting.room_for(msgspec.structs.replace(setting.decode, cell_layout="streams"))
    assert in_streams.num_cells == 17 * 964
    assert list(decode_tune.shapes(default_pair.gguf)) == list(decode_tune.SHAPES)
