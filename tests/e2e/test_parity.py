"""The parity guard with both engines: KV that was put down wrong is found out, and sound KV raises no alarm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Model
from proxy import decode_node, parity, probation
from proxy.app import create_app
from proxy.gateway import Gateway
from tests.conftest import ModelPair
from tests.cpu_decode.serving import Running as Serving
from tests.cpu_decode.serving import serving as worker_serving
from tests.e2e.conftest import Running
from tests.proxy.conftest import free_port, serving, wait_until
from transfer import codecs
from transfer.frames import Element
from transfer.kernels import BLOCK
from transfer.layout import Elements, Payload

pytestmark = pytest.mark.engines

REQUESTS = 20
PROMPT_CHARACTERS = 250


@dataclass
class Guarded:
    """A proxy and a worker in this process, in front of the stack's vLLM."""

    gateway: Gateway
    worker: Serving
    http: httpx.Client
    text: str

    def ask(self, number: int, codec: str) -> httpx.Response:
        """By route split, another piece of the text each time."""
        prompt = self.text[number * PROMPT_CHARACTERS // 2 :][:PROMPT_CHARACTERS]
        body = {"model": self.gateway.model, "prompt": prompt, "max_tokens": 3, "ignore_eos": True}
        headers = {"X-Isthmus-Route": "split", "X-Isthmus-Codec": codec}
        return self.http.post("/v1/completions", json=body, headers=headers)

    def compared(self, number: int, codec: str) -> float:
        """The KL that the guard has found in one request."""
        assert self.ask(number, codec).status_code == 200
        wait_until(lambda: self.last_entry()["parity_kl"] is not None, 30)
        return float(self.last_entry()["parity_kl"])

    def last_entry(self) -> dict[str, Any]:
        return dict(self.http.get("/ledger?last=1").json()["entries"][0])

    def tried(self, number: int) -> int | None:
        """A request is served by raw; how many good tries q8 has behind it when it has been tried once more.

        None: it is on again.
        """
        guard = self.gateway.parity
        tries = guard.probations()[0]["tries"]
        assert self.ask(number, "raw").status_code == 200
        wait_until(lambda: not (off := guard.probations()) or off[0]["tries"] > tries, 60)
        return next((each["good"] for each in guard.probations()), None)

    def requests_until_alarm(self, codec: str) -> int:
        """How many requests it takes; an alarm must come within ``REQUESTS``."""
        for number in range(REQUESTS):
            self.compared(number, codec)
            if self.gateway.parity.alarms:
                return number + 1
        raise AssertionError(f"no alarm within {REQUESTS} requests")


@pytest.fixture(scope="module")
def model(default_pair: ModelPair) -> Iterator[Model]:
    model = Model(default_pair.gguf)
    yield model
    model.close()


@pytest.fixture(scope="module")
def worker(model: Model, default_pair: ModelPair, stack: Running) -> Iterator[Serving]:
    with worker_serving(model, read_geometry(default_pair.gguf), "f16", Path(stack.cluster.keys.dir)) as running:
        yield running


@contextmanager
def guarded(stack: Running, worker: Serving, text: str, **proxy: float) -> Iterator[Guarded]:
    own = msgspec.structs.replace(stack.cluster.proxy, port=free_port(), registry_port=0, **proxy)
    decode = msgspec.structs.replace(stack.cluster.decode, control_port=worker.worker.control_port)
    cluster = msgspec.structs.replace(stack.cluster, proxy=own, decode=decode)
    app = create_app(cluster)
    gateway: Gateway = app.state.gateway
    url = f"http://127.0.0.1:{own.port}"
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(app, own.port),
        httpx.Client(base_url=url, timeout=120, trust_env=False) as http,
    ):
        patch.setattr(parity, "QUIET_S", 0.1)
        patch.setattr(decode_node, "HEARTBEAT_S", 0.1)
        wait_until(lambda: gateway.prefill.up and gateway.workers.any_status, 30)
        yield Guarded(gateway, worker, http, text)


def test_sound_kv_raises_no_alarm(stack: Running, worker: Serving, shipped_text: str):
    with guarded(stack, worker, shipped_text, parity_share=1.0) as proxy:
        found = [proxy.compared(number, "q8") for number in range(REQUESTS)]
        assert not proxy.gateway.parity.alarms
        assert proxy.http.get("/health").json()["status"] == "ok"
    assert np.median(found) < 0.05, found


def test_rotary_pairs_in_the_wrong_order_are_found_out(
    stack: Running, worker: Serving, shipped_text: str, monkeypatch: pytest.MonkeyPatch
):
    """The worker says that its model pairs halves, so that nobody reorders the keys of one that pairs neighbours."""
    promised = worker.worker._promised
    assert promised.form.rope_order == "interleaved"
    monkeypatch.setattr(promised, "form", msgspec.structs.replace(promised.form, rope_order="half"))
    # With the share that the proxy has if nobody says anything.
    with guarded(stack, worker, shipped_text, parity_share=0.02) as proxy:
        assert proxy.requests_until_alarm("auto") <= REQUESTS
        health = proxy.http.get("/health").json()
        assert health["status"] == "degraded"
        # Whatever the codec, the order is wrong: the worker gets no KV any more, and others serve.
        assert not next(iter(proxy.gateway.workers)).codecs
        assert proxy.ask(0, "auto").status_code == 503
        body = {"model": proxy.gateway.model, "prompt": "An isthmus is", "max_tokens": 3}
        answer = proxy.http.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["X-Isthmus-Route"] in ("gpu", "cpu")


def test_a_codec_that_decodes_wrongly_is_off_and_only_that_and_comes_back_when_it_is_right(
    stack: Running, worker: Serving, shipped_text: str, monkeypatch: pytest.MonkeyPatch
):
    """Every block of q8 gets the scale of the block before it, until that is mended."""
    right = codecs.CODECS["q8"]

    def wrong(payload: Payload, element: Element, cells: Element, outs: Sequence[Elements], tokens: range) -> None:
        scales = sum(out.size for out in outs) // BLOCK
        changed = np.frombuffer(payload, np.uint8).copy()
        changed[: 2 * scales] = np.roll(changed[: 2 * scales], 2)
        right.decode(changed.data, element, cells, outs, tokens)

    monkeypatch.setitem(codecs.CODECS, "q8", right._replace(decode=wrong))
    monkeypatch.setattr(probation, "FIRST_PAUSE_S", 0.0)
    with guarded(stack, worker, shipped_text, parity_share=0.02) as proxy:
        assert proxy.requests_until_alarm("q8") <= REQUESTS
        assert proxy.ask(0, "q8").status_code == 400
        assert proxy.compared(1, "raw") < 0.1
        (node,) = proxy.gateway.workers
        assert proxy.tried(2) == 0
        assert set(node.distrusted) == {"q8"}
        monkeypatch.setitem(codecs.CODECS, "q8", right)
        for number in range(3, REQUESTS):
            if proxy.tried(number) is None:
                break
        assert node.distrusted == {}
        assert proxy.http.get("/health").json()["status"] == "ok"
        assert proxy.compared(REQUESTS, "q8") < 0.1
