"""One engine as a process of the simulation: admission, prefill and decoding in steps, as vLLM and our worker do it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import simpy

from cpu_decode.budget import MAX_SLOWDOWN, MIN_TOKENS, STEP_NS
from measurements.profiles import Device, ModelShape
from measurements.roofline import Chunk, kv_bytes_per_token, kv_capacity_tokens, step_seconds

Process = Generator[simpy.Event, Any, None]


class Cores:
    """Cores that several engines compute on: those that do at the same time get equal shares of them."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self._busy = 0
        self._changed = env.event()

    def compute(self, seconds: float) -> Process:
        """What would take ``seconds`` alone."""
        self._step(+1)
        while seconds > 0:
            began_s, busy, changed = self.env.now, self._busy, self._changed
            done = self.env.timeout(seconds * busy)
            yield done | changed
            seconds = 0.0 if done.processed else seconds - (self.env.now - began_s) / busy
        self._step(-1)

    def _step(self, change: int) -> None:
        self._busy += change
        changed, self._changed = self._changed, self.env.event()
        changed.succeed()


class NoRoomError(Exception):
    """A request that this engine could not hold if it were alone."""


@dataclass(eq=False)
class Sequence:
    """A request on one engine, in tokens. ``held`` have KV here, ``prompt`` are computed here, ``output`` come after.

    ``shared`` of its prompt are the workload's common prefix; ``borrowed`` of them were here when it was admitted.
    ``admitted``, ``prefilled`` and ``done`` are when its KV was promised, its first token known, and its last one.
    ``computed`` is told of every chunk of the prompt when its step begins: its tokens, and when the step will end.
    """

    held: int
    prompt: int
    output: int
    admitted: simpy.Event
    prefilled: simpy.Event
    done: simpy.Event
    computed: Callable[[int, float], None] | None = None
    landing: bool = False
    shared: int = 0
    borrowed: int = 0

    @property
    def decodes(self) -> bool:
        """Whether the next step makes a token of it."""
        return not self.prompt and not self.landing


class Engine:
    """Runs steps while it has sequences. vLLM promises KV for prompts and takes it back when it runs out of it
    (preemption, the youngest first, recomputed later); our worker promises whole answers and never has to.
    """

    def __init__(self, env: simpy.Environment, device: Device, model: ModelShape, cores: Cores) -> None:
        self.env = env
        self.device = device
        self.model = model
        self._cores = cores
        self.capacity_tokens = kv_capacity_tokens(device, model)
        self.steps = self.preemptions = 0
        # Tokens of the workload's shared prefix that are in its cells, once for all.
        self.prefix_tokens = 0
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._stall_s = 0.0
        self._wake = env.event()
        env.process(self._run())

    @property
    def load(self) -> int:
        """Requests that are here."""
        return len(self._waiting) + len(self._active)

    @property
    def queued_prompt_tokens(self) -> int:
        """Tokens of prompts that are not computed yet."""
        return sum(sequence.prompt for sequence in (*self._waiting, *self._active))

    @property
    def contexts(self) -> list[int]:
        """Tokens of every request that decodes here, or will."""
        return [each.held + each.prompt for each in (*self._waiting, *self._active) if each.output]

    def lent(self, shared: int) -> int:
        """How many of a prompt's ``shared`` tokens need not be computed: whole blocks of what is here."""
        blocks = min(self.prefix_tokens, shared) // self.device.block_tokens
        return blocks * self.device.block_tokens

    def fits(self, prompt: int, output: int) -> bool:
        """Whether a request of this size could be held, alone."""
        return self.capacity_tokens >= (prompt if self.device.engine == "vllm" else prompt + output)

    def submit(
        self,
        prompt: int,
        output: int,
        *,
        shared: int = 0,
        landing: bool = False,
        computed: Callable[[int, float], None] | None = None,
    ) -> Sequence:
        """Queue a sequence. ``landing``: its KV comes from elsewhere (:meth:`land`), nothing of it is computed here.

        ``shared`` of its ``prompt`` need not be computed if they are here when it is admitted. Raises
        :class:`NoRoomError` if it could never be admitted.
        """
        event = self.env.event
        held, prompt = (prompt, 0) if landing else (0, prompt)
        sequence = Sequence(held, prompt, output, event(), event(), event(), computed, landing, shared)
        if self._needed(sequence) > self.capacity_tokens:
            raise NoRoomError(f"{self.device.name} has room for {self.capacity_tokens} tokens of KV")
        self._waiting.append(sequence)
        if self.device.engine == "llama.cpp":
            # Our worker promises cells when it is asked, and knows then which prefixes it has; vLLM when a step begins.
            self._admit()
        self._go_on()
        return sequence

    def land(self, sequence: Sequence, tokens: float) -> None:
        """The KV of ``sequence`` is here: writing ``tokens`` into the cells makes the next step longer."""
        self._stall_s += tokens * kv_bytes_per_token(self.model) / (self.device.inject_gb_per_s * 1e9)
        sequence.landing = False
        self.prefix_tokens = sequence.shared
        if sequence.output == 0:
            self._end(sequence)
        self._go_on()

    def _needed(self, sequence: Sequence) -> int:
        own = sequence.held + sequence.prompt - sequence.borrowed
        return own if self.device.engine == "vllm" else own + sequence.output

    def _used(self) -> int:
        return self.prefix_tokens + sum(self._needed(sequence) for sequence in self._active)

    def _go_on(self) -> None:
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Process:
        while True:
            self._admit()
            if self.device.engine == "vllm":
                self._make_room()
            decoding = [each for each in self._active if each.decodes]
            chunks = self._chunks(decoding)
            if not decoding and not chunks:
                self._wake = self.env.event()
                yield self._wake
                continue
            work = [Chunk(sequence.held, tokens) for sequence, tokens in chunks]
            step_s = self._stall_s + step_seconds(self.device, self.model, [each.held for each in decoding], work)
            self._stall_s = 0.0
            for sequence, tokens in chunks:
                if sequence.computed:
                    sequence.computed(tokens, self.env.now + step_s)
            yield from self._cores.compute(step_s)
            self.steps += 1
            self._advance(decoding, chunks)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.device.max_sequences:
            sequence = self._waiting[0]
            sequence.borrowed = self.lent(sequence.shared)
            # A prefix that nobody uses makes room.
            used = self._used() if self._active else sequence.borrowed
            if used + self._needed(sequence) > self.capacity_tokens:
                return
            self._waiting.popleft()
            if not sequence.landing:
                sequence.held += sequence.borrowed
                sequence.prompt -= sequence.borrowed
            self._active.append(sequence)
            if not sequence.admitted.triggered:
                sequence.admitted.succeed()

    def _chunks(self, decoding: list[Sequence]) -> list[tuple[Sequence, int]]:
        """What of waiting prompts goes into the next step, oldest first."""
        prompts = [sequence for sequence in self._active if sequence.prompt]
        if not prompts:
            return []
        budget = self._prompt_tokens(decoding)
        chunks = []
        for sequence in prompts:
            tokens = min(sequence.prompt, budget)
            if tokens > 0:
                chunks.append((sequence, tokens))
                budget -= tokens
        return chunks

    def _prompt_tokens(self, decoding: list[Sequence]) -> int:
        """Tokens of prompts that may share a step with ``decoding``; see ``cpu_decode/budget.py`` for our worker's."""
        if self.device.engine == "vllm":
            return self.device.step_tokens - len(decoding)
        if not decoding:
            return self.device.step_tokens
        contexts = [each.held for each in decoding]
        base_s = step_seconds(self.device, self.model, contexts, [])
        with_many_s = step_seconds(self.device, self.model, contexts, [Chunk(0, self.device.step_tokens)])
        token_s = (with_many_s - base_s) / self.device.step_tokens
        extra_s = max(MAX_SLOWDOWN * base_s, STEP_NS / 1e9) - base_s
        affordable = int(extra_s / token_s) if token_s > 0 else self.device.step_tokens
        return min(max(affordable, MIN_TOKENS), self.device.step_tokens)

    def _make_room(self) -> None:
        """Preempt the youngest until every sequence that decodes has room for its next token."""
        while len(self._active) > 1:
            if self._used() + sum(each.decodes for each in self._active) <= self.capacity_tokens:
                return
            victim = self._active.pop()
            self.preemptions += 1
            victim.prompt, victim.held, victim.borrowed = victim.held + victim.prompt, 0, 0
            self._waiting.appendleft(victim)

    def _advance(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> None:
        for sequence, tokens in chunks:
            sequence.prompt -= tokens
            sequence.held += tokens
            if sequence.prompt == 0:
                self.prefix_tokens = sequence.shared
                if not sequence.prefilled.triggered:
                    sequence.prefilled.succeed()
                if sequence.output == 0:
                    self._end(sequence)
        for sequence in decoding:
            sequence.held += 1
            sequence.output -= 1
            if sequence.output == 0:
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._active.remove(sequence)
        sequence.done.succeed()
