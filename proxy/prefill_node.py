"""The client to a prefill node: vLLM's own OpenAI server over HTTP.

Requests go to ``/v1/completions`` with token ids as the prompt. ``return_token_ids``, ``return_tokens_as_token_ids``,
``structured_outputs``, ``cache_salt``, ``prompt_logprobs`` and ``kv_transfer_params`` are vLLM's additions
(``vllm/entrypoints/openai/completion/protocol.py``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from functools import cached_property
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec
import structlog

from proxy import vllm_answers
from proxy.breaker import Breaker
from proxy.load import VllmLoad
from proxy.vllm_answers import Counts, Delta, FirstToken, PromptLogprobs
from transfer.energy import POWER_HEADER, Power
from transfer.errors import EngineError, LinkError
from transfer.messages import Sampling, Ticket

HEARTBEAT_S = 1.0
SILENCE_S = 3.0
STREAM_SILENCE_S = 300.0
_CONNECT_S = 3.0
_REST_S = 0.05
# Less than the 5 s after which uvicorn, vLLM's server, closes a connection: none is used that is just being closed.
_KEEP_ALIVE_S = 3.0
_GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS
# Fields of Sampling that vLLM spells alike and means alike.
_SAME_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
)
_DATA, _DONE = b"data: ", b"data: [DONE]"

log = structlog.get_logger()


class PrefillNode:
    """vLLM's server at the address ``name``, HOST:PORT; ``up`` while its ``/health`` answers."""

    def __init__(self, name: str, model: str, max_connections: int) -> None:
        self.name = name
        self.url = f"http://{name}"
        self.load = VllmLoad()
        self.breaker = Breaker()
        self.up = False
        self.down_reason = "not connected yet"
        self.power: Power | None = None
        self._model = model
        self._max_connections = max_connections

    @property
    def state(self) -> str:
        """For people: ``up``, ``down``, or ``failing``, which is up and left out for a while."""
        if not self.up:
            return "down"
        return "failing" if self.breaker.failing(time.monotonic_ns()) else "up"

    @cached_property
    def _http(self) -> aiohttp.ClientSession:
        """Made in the event loop that it is used in. The link is ours: no proxy from the environment, no cookies."""
        return aiohttp.ClientSession(
            self.url,
            # One connection is kept for the heartbeat.
            connector=aiohttp.TCPConnector(limit=self._max_connections + 1, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_S, sock_read=STREAM_SILENCE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def run(self) -> None:
        """Poll ``/health`` until cancelled."""
        heard_ns = time.monotonic_ns()
        timeout = aiohttp.ClientTimeout(SILENCE_S)
        try:
            while True:
                try:
                    async with self._http.get("/health", timeout=timeout, raise_for_status=True) as answer:
                        power = answer.headers.get(POWER_HEADER)
                except (aiohttp.ClientError, TimeoutError) as error:
                    refused = isinstance(error, aiohttp.ClientConnectorError)
                    if refused or time.monotonic_ns() - heard_ns > SILENCE_S * 1e9:
                        self._mark(up=False, reason=_say(error))
                else:
                    heard_ns = time.monotonic_ns()
                    self.power = _power(power)
                    self._mark(up=True)
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            await self._http.close()

    async def prefill(
        self,
        request_id: str,
        prompt: list[int],
        sampling: Sampling,
        ticket: Ticket,
        timeout_s: float,
        *,
        tenant: str = "",
    ) -> FirstToken:
        """Prefill ``prompt``, export its KV to ``ticket`` and sample one token.

        vLLM's prefix cache serves it with what requests of the same ``tenant`` left there.

        Raises :class:`LinkError` when vLLM is unreachable or takes longer than ``timeout_s``, :class:`EngineError` when
        it fails and :class:`RequestError` when it refuses the request.
        """
        body = self._body(prompt, sampling, tenant) | {
            "max_tokens": 1,
            "min_tokens": min(1, sampling.min_tokens),
            "structured_outputs": None,
            "return_token_ids": True,
            "kv_transfer_params": {"isthmus": msgspec.to_builtins(ticket)},
        }
        try:
            async with asyncio.timeout(timeout_s):
                async with self._post(request_id, body) as response:
                    completion = vllm_answers.parse(await response.read())
        except TimeoutError:
            raise LinkError(f"the prefill node at {self.url} took longer than {timeout_s:.3g} s") from None
        return vllm_answers.first_token(completion, sampling)

    async def prompt_logprobs(
        self, request_id: str, prompt: list[int], num_top: int, *, tenant: str = ""
    ) -> PromptLogprobs:
        """Log probabilities of the prompt's tokens, with ``num_top`` alternatives each. Errors as above."""
        body = self._body(prompt, Sampling(max_tokens=1, temperature=0.0), tenant) | {"prompt_logprobs": num_top}
        async with self._post(request_id, body) as response:
            completion = vllm_answers.parse(await response.read())
        if not completion.choices or completion.choices[0].prompt_logprobs is None:
            raise EngineError("vLLM answered without prompt_logprobs")
        return completion.choices[0].prompt_logprobs

    async def stream(
        self,
        request_id: str,
        prompt: list[int],
        sampling: Sampling,
        *,
        choices: int = 1,
        echo: bool = False,
        tenant: str = "",
    ) -> AsyncGenerator[Delta | Counts, None]:
        """Generate the whole answer on the prefill node: Deltas of ``choices`` choices, then Counts.

        With ``echo`` each choice begins with the prompt's text and log probabilities. Closing the generator makes vLLM
        abort. Errors as above.
        """
        # Greedy choices are all the same, and vLLM makes one of them only.
        copies = choices if sampling.temperature < _GREEDY_BELOW else 1
        body = self._body(prompt, sampling, tenant) | {
            "n": choices // copies,
            "echo": echo,
            "stream": True,
            "stream_options": {"include_usage": True},
            # With ids vLLM leaves the prompt's text out of an echo.
            "return_token_ids": not echo,
        }
        open_choices = choices // copies
        async with self._post(request_id, body) as response, aclosing(_events(response)) as events:
            async for data in events:
                chunk = vllm_answers.parse(data)
                for choice in chunk.choices:
                    open_choices -= choice.finish_reason is not None
                    delta = vllm_answers.delta(choice, sampling)
                    for copy in range(copies):
                        yield delta._replace(choice=delta.choice + copy)
                if chunk.usage and not chunk.choices and not open_choices:
                    await _read_rest(events)
                    yield Counts(copies * chunk.usage.completion_tokens, chunk.usage.cached_tokens)
                    return
        raise EngineError("vLLM's stream ended before its answer did")

    @asynccontextmanager
    async def _post(self, request_id: str, body: dict[str, Any]) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        headers = {"X-Request-Id": request_id, "Content-Type": "application/json"}
        content = msgspec.json.encode(body)
        try:
            async with self._http.post("/v1/completions", data=content, headers=headers) as response:
                if response.status != HTTPStatus.OK:
                    raise vllm_answers.refusal(response.status, await response.read())
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LinkError(f"the prefill node at {self.url} failed: {_say(error)}") from None

    def _body(self, prompt: list[int], sampling: Sampling, tenant: str) -> dict[str, Any]:
        # Every field is written out, so that no default of the server's can make the two engines sample differently.
        return {
            "model": self._model,
            "prompt": prompt,
            **{field: getattr(sampling, field) for field in _SAME_FIELDS},
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
            "structured_outputs": _structured_outputs(sampling),
            "return_tokens_as_token_ids": True,
            "cache_salt": tenant or None,
        }

    def _mark(self, *, up: bool, reason: str = "") -> None:
        if up and not self.up:
            log.info("prefill node is up", url=self.url)
        elif not up and (self.up or reason != self.down_reason):
            log.warning("prefill node is down", url=self.url, reason=reason)
        self.up = up
        self.down_reason = reason
        if not up:
            self.power = None


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[bytearray, None]:
    """The data of server-sent events, of one line each, of any length, up to the one that ends the stream."""
    begun = bytearray()
    async for data in response.content.iter_any():
        begun += data
        *lines, begun = begun.split(b"\n")
        for line in lines:
            event = line.rstrip(b"\r")
            if event.startswith(_DATA) and event != _DONE:
                yield event[len(_DATA) :]


async def _read_rest(events: AsyncGenerator[bytearray, None]) -> None:
    """Read what is left of a complete answer, if it comes at once: a connection read to its end serves again."""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_REST_S):
            async for _ in events:
                pass


def _structured_outputs(sampling: Sampling) -> dict[str, Any] | None:
    """What the answer must match, as far as vLLM is asked for it."""
    if sampling.json_schema:
        return {"json": msgspec.json.decode(sampling.json_schema)}
    return {"regex": sampling.regex} if sampling.regex else None


def _say(error: aiohttp.ClientError | TimeoutError) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return str(cause) or type(error).__name__


def _power(header: str | None) -> Power | None:
    """What the node says of its power; None if that is nothing, or nothing that we understand."""
    if header is None:
        return None
    try:
        return msgspec.json.decode(header, type=Power)
    except msgspec.DecodeError:
        return None
