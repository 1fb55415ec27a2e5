"""A whole proxy on loopback: the real application in uvicorn, between a fake vLLM and a fake decode worker."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxy.app import create_app
from proxy.breaker import Breaker
from proxy.costs import WINDOW
from proxy.estimates import Estimates
from proxy.gateway import Gateway
from proxy.ledger import Entry, Ledger
from tests.proxy.fake_prefill import FakePrefill, PrefillScript
from tests.proxy.fake_worker import FakeWorker, Script
from transfer.config import Cluster, Decode, Link, Pair, Prefill, Proxy

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with 258 tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate(["</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("pair")
    fast.save_pretrained(folder)
    return folder


# In an order of this process's own, none again before all the others.
_ports = itertools.cycle(random.sample(range(20_000, 32_000), 12_000))


def free_port() -> int:
    """One that nobody listens at, of those that the system gives to no outgoing connection in the meantime."""
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("ports never end")


def wait_until(what: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@contextmanager
def serving(app: Any, port: int) -> Iterator[None]:
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name=f"server {port}")
    thread.start()
    try:
        # The first one imports transformers, which takes long on a busy machine.
        wait_until(lambda: server.started or not thread.is_alive(), 60)
        assert server.started
        yield
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Stack:
    """The proxy's address and its three participants."""

    url: str
    gateway: Gateway
    prefill: FakePrefill
    worker: FakeWorker
    http: httpx.Client

    def chat(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        whole = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **body}
        return self.http.post("/v1/chat/completions", json=whole, headers=headers)

    def complete(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **body}, headers=headers)

    def entries(self) -> list[dict[str, Any]]:
        return list(self.http.get("/ledger").json()["entries"])

    def assert_idle(self) -> None:
        """No request holds anything anywhere."""
        wait_until(lambda: self.gateway.admission.running == 0 and self.gateway.admission.queued == 0)
        assert not any(node.conversations for node in self.gateway.workers)
        wait_until(lambda: not self.worker.open and not self.prefill.open)


def make_cluster(hf_dir: Path, **proxy: Any) -> Cluster:
    proxy = {"parity_share": 0.0} | proxy
    return Cluster(
        pair=Pair(name="tiny", hf_dir=str(hf_dir), gguf=str(hf_dir)),
        prefill=Prefill(port=free_port(), max_model_len=201),
        decode=Decode(control_port=free_port(), num_cells=300),
        proxy=Proxy(port=free_port(), registry_port=free_port(), **proxy),
        link=Link(transfer_deadline_s=2.0, seal="none"),
    )


@contextmanager
def running(cluster: Cluster, *, prefill_up: bool = True, decode_up: bool = True) -> Iterator[Stack]:
    prefill = FakePrefill()
    worker = FakeWorker(f"tcp://127.0.0.1:{cluster.decode.control_port if decode_up else free_port()}")
    app = create_app(cluster)
    gateway: Gateway = app.state.gateway
    url = f"http://127.0.0.1:{cluster.proxy.port}"
    try:
        with (
            serving(prefill.app, cluster.prefill.port if prefill_up else free_port()),
            serving(app, cluster.proxy.port),
            httpx.Client(base_url=url, timeout=20, trust_env=False) as http,
        ):
            wait_until(lambda: gateway.prefill.up == prefill_up and gateway.workers.up == decode_up)
            wait_until(lambda: gateway.workers.any_status or not decode_up)
            stack = Stack(url, gateway, prefill, worker, http)
            yield stack
            # A test may have put another one in its place.
            worker = stack.worker
    finally:
        worker.close()


@pytest.fixture(scope="session")
def shared_stack(hf_dir: Path) -> Iterator[Stack]:
    with running(make_cluster(hf_dir)) as stack:
        yield stack


class SplitIsBest(Estimates):
    """As if many requests had shown that, so that a test need not say which route it means; it learns no better."""

    def __init__(self) -> None:
        super().__init__()
        for _ in range(WINDOW):
            self.vllm("some").prefill.observe(1, 1, 0)
            self.vllm("some").step.observe(10**12, 1, 0, 0)
            self.worker("some").step.observe(1, 1, 0, 0)

    def learn(self, entry: Entry) -> None:
        """Nothing."""


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The shared proxy with fresh scripts, nothing recorded and an empty ledger; idle again after the test."""
    shared_stack.prefill.script = PrefillScript()
    shared_stack.worker.script = Script()
    shared_stack.prefill.bodies.clear()
    shared_stack.worker.said.clear()
    shared_stack.gateway.ledger = Ledger(1000)
    shared_stack.gateway.dispatcher.planner.estimates = SplitIsBest()
    for node in (*shared_stack.gateway.prefill, *shared_stack.gateway.workers):
        node.breaker = Breaker()
    yield shared_stack
    shared_stack.assert_idle()
