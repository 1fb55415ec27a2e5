"""Models whose KV cannot be split, served whole: the answers are those of llama.cpp alone.

With bf16 cells: logits do not depend on where those lie.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_decode import unsplit
from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from isthmus.ports import free_ports
from tests.cpu_decode.asking import ask, ask_for_choices, gather
from tests.cpu_decode.random_gguf import write
from tests.cpu_decode.serving import MAX_SEQUENCES, Running, serving
from tests.cpu_decode.test_worker import eventually
from tests.cpu_decode.worker_client import WorkerClient
from transfer import keys
from transfer.config import Cluster, Decode, Keys, Pair, Prefill, Proxy, dump
from transfer.errors import CodecError, ConfigError, UnsplittableError
from transfer.geometry import NO_KV
from transfer.messages import PROTOCOL, Hello, Sampling, Welcome

GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [3 + (salt * 131 + n * 37 + n * n * 11) % 500 for n in range(length)]


@pytest.fixture(scope="module", params=["recurrent", "hybrid", "latent"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write(request.param, tmp_path_factory.mktemp("unsplit")))
    yield model
    model.close()


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    with serving(model, NO_KV, "bf16") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "running" in request.fixturenames:
        running = request.getfixturevalue("running")
        eventually(lambda: running.client.status().used_cells == 0)
        assert running.empty


def computed(model: Model, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind ``prompt``, in a context that knows nothing else."""
    context = Context(model, num_cells=512, max_sequences=1, batch_tokens=256, threads=1, cell_type="bf16")
    batch, tokens = Batch(256), list(prompt)
    row = batch.add(0, 0, tokens, want_logits=True)
    while True:
        context.decode(batch)
        tokens.append(int(context.logits(row).argmax()))
        if len(tokens) == len(prompt) + count:
            context.close()
            return tokens[len(prompt) :]
        batch.clear()
        row = batch.add(0, len(tokens) - 1, tokens[-1:], want_logits=True)


def test_the_reason_is_given_where_kv_is_to_be_exported(model):
    with pytest.raises(UnsplittableError, match=r"cannot be split yet; \[prefill\] export = false serves it"):
        unsplit.geometry_or_no_kv(lambda: read_geometry(model.gguf), export=True)
    assert unsplit.geometry_or_no_kv(lambda: read_geometry(model.gguf), export=False) == NO_KV


def test_what_takes_kv_apart_is_off():
    decode = Decode(speculate="always", disk_pool_dir="/pool", shared_pool_url="redis://pool", draft_gguf="draft.gguf")
    assert unsplit.settings(decode) == Decode(speculate="off", pool_mib=0)
    with pytest.raises(ConfigError, match=r"set \[decode\] cell_layout to unified"):
        unsplit.settings(Decode(cell_layout="streams"))


def test_answers_are_those_of_llama_cpp(running, model):
    for length in (5, 200):
        assert ask(running, GREEDY, prompt_of(length)).ids == computed(model, prompt_of(length), GREEDY.max_tokens)


def test_many_at_once_answer_as_one_by_one(running):
    prompts = [prompt_of(20 + 37 * n, salt=n) for n in range(MAX_SEQUENCES)]
    alone = [ask(running, GREEDY, prompt).ids for prompt in prompts]
    # The last one's sequence is free a moment after its last word.
    eventually(lambda: running.client.status().reserved_sequences == 0)
    tickets = [running.client.reserve(prompt, GREEDY, "local") for prompt in prompts]
    for ticket in tickets:
        running.client.start(ticket)
    assert [gather(running, ticket, 1)[0][0].ids for ticket in tickets] == alone


def test_choices_go_on_from_one_prompt(running, model):
    answers, report = ask_for_choices(running, GREEDY, 3, prompt_of(70))
    assert [answer.ids for answer in answers] == [computed(model, prompt_of(70), GREEDY.max_tokens)] * 3
    assert report.completion_tokens == 3 * GREEDY.max_tokens


def test_an_abort_frees_what_it_held(running):
    ticket = running.client.reserve(prompt_of(300), LONG, "local")
    running.client.start(ticket)
    running.client.next_tokens(ticket)
    running.client.abort(ticket)


def test_kv_from_elsewhere_is_refused(running):
    with pytest.raises(CodecError, match="cannot be split"):
        running.client.reserve(prompt_of(10), GREEDY, "kv")


def test_who_waits_in_ram_for_cells_goes_on_with_the_same_words(model):
    prompts = [prompt_of(40, salt=n) for n in range(3)]
    with serving(model, NO_KV, "bf16", num_cells=256, promised_share=0.1) as running:
        tickets = [running.client.reserve(prompt, LONG, "local") for prompt in prompts]
        for ticket in tickets:
            running.client.start(ticket)
        answers = [gather(running, ticket, 1) for ticket in tickets]
    assert [answer[0].ids for answer, _ in answers] == [computed(model, prompt, 100) for prompt in prompts]
    # A recurrent state takes one cell, however long the text.
    assert (sum(report.preemptions for _, report in answers) == 0) == (model.gguf.stem == "recurrent")


def _started(folder: Path, gguf: Path, *, export: bool) -> tuple[subprocess.Popen[str], Decode]:
    ports = free_ports(3)
    decode = Decode(control_port=ports[0], kv_port=ports[1], kv_control_port=ports[2], threads=1, landing_mib=64)
    cluster = Cluster(
        pair=Pair(name=gguf.stem, hf_dir=str(folder), gguf=str(gguf)),
        prefill=Prefill(export=export),
        decode=decode,
        proxy=Proxy(registry_port=0),
        keys=Keys(dir=str(folder / "keys")),
    )
    (folder / "isthmus.toml").write_bytes(dump(cluster))
    keys.make(folder / "keys")
    command = [sys.executable, "-m", "isthmus", "decode", "--config", str(folder / "isthmus.toml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True), decode


def test_a_workers_process_serves_it_only_where_no_kv_is_to_be_exported(model, tmp_path):
    refused, _ = _started(tmp_path, model.gguf, export=True)
    assert "export = false serves it by routes gpu and cpu" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2
    served, decode = _started(tmp_path, model.gguf, export=False)
    with served:
        try:
            client = WorkerClient(decode.control_port, keys.client(tmp_path / "keys", "proxy"))
            welcome = client.ask(Hello(protocol=PROTOCOL))
            assert isinstance(welcome, Welcome)
            assert (welcome.codecs, welcome.geometry) == ((), NO_KV)
            ticket = client.reserve(prompt_of(9), GREEDY, "local")
            client.start(ticket)
            assert client.collect(ticket)[0] == computed(model, prompt_of(9), GREEDY.max_tokens)
            client.close()
        finally:
            # Or leaving the block would wait for a worker that nobody has asked to end.
            served.terminate()
    assert served.returncode == 0
