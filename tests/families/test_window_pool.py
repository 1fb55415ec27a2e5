"""A model with sliding windows on a real worker: long prompts and answers come back from RAM and from disk, whole.

Its window is shorter than a block elsewhere, so its blocks are shorter, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Model
from tests.cpu_decode.serving import Running, serving
from tests.cpu_decode.test_worker import eventually as soon
from tests.families.tiny_pair import HEAD_DIM, KV_HEADS, LAYERS, WINDOW, make
from transfer.frames import Element
from transfer.geometry import KVGeometry
from transfer.messages import Sampling, Ticket, Tokens

pytestmark = pytest.mark.engines

# Nearly five blocks; chunks of 64 do not end where they do.
PROMPT = [1, *random.Random(7).choices(range(3, 500), k=5 * WINDOW - 4)]
ANSWER = Sampling(max_tokens=3 * WINDOW, temperature=0.0, ignore_eos=True)
SHORT = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


def eventually(check) -> None:
    soon(check, 60)


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def windowed(request, tmp_path_factory) -> Iterator[tuple[Model, KVGeometry]]:
    gguf = make(request.param, tmp_path_factory.mktemp("windowed")).gguf
    model = Model(gguf)
    yield model, read_geometry(gguf)
    model.close()


def on_disk(folder: Path) -> dict[str, object]:
    return {"num_cells": 2048, "pool_mib": 16, "disk_pool_dir": str(folder), "disk_pool_mib": 16}


def ask(running: Running, prompt: list[int], sampling: Sampling, beside: int = 0) -> tuple[list[int], Tokens]:
    """An answer; ``beside`` it, a prompt of so many tokens comes and goes: then llama.cpp looks for cells in front."""
    ticket = running.client.reserve(prompt, sampling, "local")
    running.client.start(ticket)
    begun: list[int] = []
    if beside:
        begun = running.client.next_tokens(ticket).token_ids
        other = running.client.reserve([9] * beside, SHORT, "local", reuse=False)
        running.client.start(other)
        running.client.collect(other)
    ids, _, last = running.client.collect(ticket)
    eventually(lambda: not running.client.status().reserved_sequences)
    return begun + ids, last


def empty_ram(running: Running) -> None:
    tree = running.worker._promised.prefixes._tree
    for block in list(tree._blocks):
        tree.discard(block)


def blocks_of(*sequences: list[int]) -> int:
    """How many blocks the cells of these tokens make, a shared beginning once; the last token has no cell."""
    return len({tuple(ids[:end]) for ids in sequences for end in range(WINDOW, len(ids), WINDOW)})


def blocks_on_disk(running: Running) -> int:
    return next(tier.blocks for tier in running.client.status().tiers if tier.name == "disk")


def test_long_prompts_and_answers_come_back_from_ram_and_from_disk(windowed, tmp_path):
    model, geometry = windowed
    with serving(model, geometry, "f16", **on_disk(tmp_path)) as running:
        # May be another answer than from lent cells: it was computed beside another prompt.
        beside, last = ask(running, PROMPT, ANSWER, beside=600)
        assert last.report.kv_reused_tokens == 0
        fresh, last = ask(running, PROMPT, ANSWER)
        assert last.report.kv_reused_tokens == len(PROMPT) - 1
        again, last = ask(running, PROMPT, ANSWER)
        assert (again, last.report.kv_reused_tokens) == (fresh, len(PROMPT) - 1)
        follow_up = [*PROMPT, *fresh, 7, 8, 9]
        second, last = ask(running, follow_up, SHORT)
        assert last.report.kv_reused_tokens == len(PROMPT) + len(fresh) - 1
        known = blocks_of([*PROMPT, *fresh])
        assert known == 7
        written = blocks_of([*PROMPT, *beside], [*follow_up, *second])
        eventually(lambda: blocks_on_disk(running) == written)
    with serving(model, geometry, "f16", **on_disk(tmp_path)) as running:
        eventually(lambda: blocks_on_disk(running) == written)
        restored, last = ask(running, follow_up, SHORT)
        assert (restored, last.report.kv_reused_tokens) == (second, known * WINDOW)
        empty_ram(running)
        restored, last = ask(running, PROMPT, ANSWER)
        assert (restored, last.report.kv_reused_tokens) == (fresh, (len(PROMPT) - 1) // WINDOW * WINDOW)


def test_kv_from_the_wire_is_kept_before_its_cells_go_to_later_chunks(windowed, tmp_path):
    model, geometry = windowed
    row = KV_HEADS * HEAD_DIM
    random_rows = np.random.default_rng(3).standard_normal((LAYERS, 2, len(PROMPT) * row)).astype(np.float32)
    bf16 = (random_rows.view(np.uint32) >> 16).astype(np.uint16)

    def send(running: Running, ticket: Ticket) -> None:
        running.sender.open(ticket)
        for start in range(ticket.reused_tokens, len(PROMPT), ticket.chunk_tokens):
            tokens = range(start, min(start + ticket.chunk_tokens, len(PROMPT)))
            part = bf16[:, :, tokens.start * row : tokens.stop * row].reshape(LAYERS, -1)
            assert running.sender.submit(ticket.ticket, tokens, 0, np.ascontiguousarray(part), Element.BF16, 0)
        running.sender.finish(ticket.ticket, len(PROMPT))

    def answer(running: Running) -> tuple[list[int], int]:
        ticket = running.client.reserve(PROMPT, SHORT, "kv")
        send(running, ticket)
        running.client.start(ticket)
        ids, _, last = running.client.collect(ticket)
        eventually(lambda: not running.client.status().reserved_sequences)
        return ids, last.report.kv_reused_tokens

    with serving(model, geometry, "f16", **on_disk(tmp_path)) as running:
        fresh, reused_tokens = answer(running)
        assert reused_tokens == 0
        assert answer(running) == (fresh, len(PROMPT) - 1)
        eventually(lambda: blocks_on_disk(running) == (len(PROMPT) + SHORT.max_tokens - 1) // WINDOW)
        empty_ram(running)
        assert answer(running) == (fresh, len(PROMPT) // WINDOW * WINDOW)
