"""Many mixed requests with random aborts: nothing is left over. ``ISTHMUS_SOAK_REQUESTS`` says how many they are.

A long one, for each layout of cells: ``ISTHMUS_SOAK_REQUESTS=2000 .venv/bin/pytest tests/cpu_decode/test_soak.py``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time

import pytest

from tests.cpu_decode.serving import LAYOUTS, Running, serving
from transfer.errors import CapacityError
from transfer.messages import Failure, Sampling, Start, Ticket, Tokens

REQUESTS = int(os.environ.get("ISTHMUS_SOAK_REQUESTS", "40"))
IN_FLIGHT = 5
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]})
OPTIONS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 4, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 1.0, "typical_p": 0.8, "logprobs": 5},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logprobs": 0},
    {"dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"json_schema": SCHEMA},
    {"grammar": 'root ::= [a-z]+ ("," [a-z]+)*', "min_tokens": 2},
    {"stop": (" the", "a"), "min_tokens": 1, "stop_token_ids": (198,)},
]


class Crowd:
    """Clients that ask, listen for a while and sometimes lose interest."""

    def __init__(self, running: Running, random: random.Random) -> None:
        self._client = running.client
        self._random = random
        self._tickets: dict[str, Ticket] = {}
        self.ended = self.aborted = 0

    def ask(self) -> bool:
        """Ask for one more answer; False if the worker is full."""
        draw = self._random
        common = [(7 * i + 3) % 40_000 for i in range(draw.choice([0, 40, 120]))]
        prompt = [*common, *draw.sample(range(40_000), draw.randint(1, 30))]
        sampling = Sampling(max_tokens=draw.randint(2, 12), **draw.choice(OPTIONS))
        choices, source = draw.choice([1, 1, 1, 2, 3]), draw.choice(["local", "local", "kv"])
        try:
            ticket = self._client.reserve(prompt, sampling, source, choices=choices)
        except CapacityError:
            return False
        self._tickets[ticket.request_id] = ticket
        first_token = None
        if not (sampling.json_schema or sampling.grammar) and draw.random() < 0.3:
            first_token = draw.randrange(40_000)
        started = draw.random() < 0.9
        if started:
            self._client.send(Start(request_id=ticket.request_id, first_token=first_token, local=source == "kv"))
        if not started or draw.random() < 0.1:
            self.abort(ticket.request_id)
        return True

    def listen(self) -> None:
        try:
            message = self._client.listen()
        except TimeoutError:
            # A worker that stands still and a host that is merely busy look the same from outside.
            faulthandler.dump_traceback(sys.__stderr__)
            print(self._client.status(), self._tickets, file=sys.__stderr__)
            raise
        if message.request_id not in self._tickets:
            return
        assert not isinstance(message, Failure), message
        assert isinstance(message, Tokens)
        if message.report is not None:
            del self._tickets[message.request_id]
            self.ended += 1
        elif self._random.random() < 0.02:
            self.abort(message.request_id)

    def abort(self, request_id: str) -> None:
        self._client.abort(self._tickets.pop(request_id))
        self.aborted += 1

    @property
    def size(self) -> int:
        return len(self._tickets)


@pytest.mark.parametrize(
    ("layout", "speculate"), [("unified", "always"), ("unified", "auto"), ("streams", "always"), ("streams", "auto")]
)
@pytest.mark.timeout(max(280, 3 * REQUESTS))
def test_nothing_is_left_of_many_requests(model, geometry, layout, speculate):
    threads = set(threading.enumerate())
    with serving(model, geometry, "bf16", pool_mib=16, speculate=speculate, **LAYOUTS[layout]) as running:
        crowd = Crowd(running, random.Random(20))
        while crowd.ended + crowd.aborted < REQUESTS // 2:
            if crowd.size < IN_FLIGHT and crowd.ask():
                continue
            if crowd.size:
                crowd.listen()
            else:
                time.sleep(0.05)
        while crowd.size:
            crowd.listen()
        assert crowd.ended and crowd.aborted
        deadline = time.monotonic() + 30
        while (status := running.client.status()).used_cells or status.reserved_sequences:
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
        assert (status.running_sequences, status.landing_bytes) == (0, 0)
        assert status.retained_bytes <= 16 << 20
        assert running.empty
    assert set(threading.enumerate()) <= threads
