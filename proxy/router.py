"""Which routes a request may take: what it asks for, what each engine can do, and what is up. ``policy.py`` picks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from proxy.failures import ContextLengthError
from transfer.codecs import CODECS
from transfer.config import AUTO_CODEC, Cluster
from transfer.errors import CodecError, LinkError, RequestError
from transfer.messages import Sampling

Route = Literal["split", "gpu", "cpu"]
Reason = Literal[
    "min_ttft",
    "min_e2e",
    "max_goodput",
    "round_robin",
    "forced",
    "cold",
    "explores",
    "prefill_down",
    "prefill_failing",
    "decode_down",
    "decode_failing",
    "only_vllm_can",
    "worker_full",
    "failed_over",
    "cached",
    "shadow",
]

HEADER = "X-Isthmus-Route"
REASON_HEADER = "X-Isthmus-Reason"
CODEC_HEADER = "X-Isthmus-Codec"
SLO_TTFT_HEADER = "X-SLO-TTFT-Ms"
SLO_TPOT_HEADER = "X-SLO-TPOT-Ms"
ROUTES: tuple[Route, ...] = get_args(Route)
LOSSLESS = frozenset(("raw", "lz4", "zstd"))
_MAX_OBJECTIVE_MS = 86_400_000
_NEEDS = {"split": ("prefill", "decode"), "gpu": ("prefill",), "cpu": ("decode",)}


class Open(NamedTuple):
    """The routes that may be taken, and why there is only one."""

    routes: tuple[Route, ...]
    reason: Reason | None = None


class Objectives(NamedTuple):
    """What a client wants at most, in ns: time to first token, time per output token. None: as the file says."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None


def parse_route(header: str | None) -> Route | None:
    """The route that a client forces, or None for ``auto``; :class:`RequestError` for anything else."""
    if header is None or header == "auto":
        return None
    for route in ROUTES:
        if header == route:
            return route
    raise RequestError(f"{HEADER} is {header!r}; use one of {', '.join(ROUTES)}, auto", HEADER)


def parse_codec(header: str | None) -> str | None:
    """The codec that a client asks for, or None for the configured one; :class:`RequestError` for anything else."""
    if header is None or header == AUTO_CODEC or header in CODECS:
        return header
    raise RequestError(f"{CODEC_HEADER} is {header!r}; use one of {', '.join(CODECS)}, auto", CODEC_HEADER)


def parse_objectives(headers: Mapping[str, str]) -> Objectives:
    """What a client's headers want, in milliseconds; :class:`RequestError` for what is no such number."""
    ttft, tpot = ((name, headers.get(name)) for name in (SLO_TTFT_HEADER, SLO_TPOT_HEADER))
    return Objectives(_objective_ns(*ttft), _objective_ns(*tpot))


def _objective_ns(name: str, header: str | None) -> int | None:
    if header is None:
        return None
    try:
        value_ms = float(header)
    except ValueError:
        value_ms = math.nan
    if not 0 < value_ms <= _MAX_OBJECTIVE_MS:
        raise RequestError(f"{name} is {header!r}; it must be a number of milliseconds, at most a day", name)
    return round(value_ms * 1e6)


def possible_codecs(
    asked: str | None, configured: str, possible: Sequence[str], distrusted: Mapping[str, str]
) -> tuple[str, ...]:
    """Those of ``possible`` that may carry a request's KV, the preferred one first; raises as :func:`choose_codec`.

    Where nobody names one they are the first and those without loss.
    """
    first = choose_codec(asked, configured, possible, distrusted)
    if (asked or configured) != AUTO_CODEC:
        return (first,)
    others = (name for name in possible if name in LOSSLESS and name != first and name not in distrusted)
    return (first, *others)


def choose_codec(
    asked: str | None, configured: str, possible: Sequence[str], distrusted: Mapping[str, str] | None = None
) -> str:
    """How KV travels to a worker that takes the codecs ``possible``, the preferred one first.

    Those in ``distrusted`` are left out, for the reason given there; if that is the configured one, another is taken.
    Raises :class:`RequestError` if the one ``asked`` for is not possible, :class:`CodecError` if the ``configured`` one
    is not, or none is.
    """
    distrusted = distrusted or {}
    if asked is not None and asked in distrusted:
        raise RequestError(f"{CODEC_HEADER}: {asked} is switched off: {distrusted[asked]}", CODEC_HEADER)
    possible = [codec for codec in possible if codec not in distrusted]
    wanted = asked or (AUTO_CODEC if configured in distrusted else configured)
    if wanted in possible:
        return wanted
    if not possible:
        raise CodecError("no codec can land this model's KV in the decode worker's cells; use route gpu or cpu")
    if wanted == AUTO_CODEC:
        return possible[0]
    can = f"cannot land in the decode worker's cells; use one of {', '.join(possible)}, auto"
    if asked:
        raise RequestError(f"{CODEC_HEADER}: {asked} {can}", CODEC_HEADER)
    raise CodecError(f"[link] codec: {configured} {can}")


def unknown_to_vllm(sampling: Sampling, prior_output: int = 0) -> str | None:
    """The first of the request's fields that only llama.cpp has, None if vLLM can do all that is asked.

    With ``prior_output`` tokens of the answer in the prompt, vLLM cannot do what looks at output: it takes them for
    input.
    """
    asked = {
        "grammar": sampling.grammar,
        "typical_p": sampling.typical_p < 1,
        "xtc_probability": sampling.xtc_probability,
        "dry_multiplier": sampling.dry_multiplier,
    }
    if prior_output:
        asked |= {
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "response_format": sampling.json_schema,
            "structured_outputs": sampling.regex,
        }
    return next((field for field, used in asked.items() if used), None)


def bar(sampling: Sampling, *, echo: bool, prior_output: int = 0) -> dict[Route, str]:
    """The routes that cannot serve a request, each with the request's field that it lacks.

    ``echo`` asks for the log probabilities of the prompt's tokens, which only vLLM gives.
    """
    if echo:
        return {"split": "echo", "cpu": "echo"}
    field = unknown_to_vllm(sampling, prior_output)
    return {"gpu": field} if field else {}


def open_routes(
    forced: Route | None,
    *,
    prefill_up: bool,
    decode_up: bool,
    barred: Mapping[Route, str] | None = None,
    prefill_failing: bool = False,
    decode_failing: bool = False,
) -> Open:
    """The routes whose nodes are up, but none that is ``barred`` (see :func:`bar`).

    A node that is up and fails again and again is left out where the other one can serve alone.

    Raises :class:`RequestError` if a barred route is forced and :class:`LinkError` if what is needed is down.
    """
    barred = barred or {}
    up = {"prefill": prefill_up, "decode": decode_up}
    if forced and forced in barred:
        allowed = ", ".join(route for route in ROUTES if route not in barred)
        raise RequestError(
            f"route {forced} cannot serve {barred[forced]}; leave it out, or use {allowed}", barred[forced]
        )
    if "cpu" in barred:
        if not prefill_up:
            raise LinkError(f"{barred['cpu']} needs the prefill node, which is down")
        return Open(("gpu",), "forced" if forced else "only_vllm_can")
    if "gpu" in barred and not decode_up:
        raise LinkError(f"{barred['gpu']} needs the decode node, which is down")
    if forced:
        down = [node for node in _NEEDS[forced] if not up[node]]
        if down:
            raise LinkError(f"route {forced} needs the {' and the '.join(down)} node, which is down")
        return Open((forced,), "forced")
    if prefill_up and decode_up and prefill_failing != decode_failing:
        alone = Open(("cpu",), "prefill_failing") if prefill_failing else Open(("gpu",), "decode_failing")
        if alone.routes[0] not in barred:
            return alone
    if prefill_up and decode_up:
        return Open(tuple(route for route in ROUTES if route not in barred))
    if prefill_up:
        return Open(("gpu",), "decode_down")
    if decode_up:
        return Open(("cpu",), "prefill_down")
    raise LinkError("the prefill node and the decode node are down")


def ways_on(
    forced: Route | None,
    *,
    prefill_up: bool,
    another_worker_up: bool,
    some_worker_up: bool,
    barred: Mapping[Route, str],
) -> tuple[Route, ...]:
    """The routes on which an answer may go on after a node has failed it.

    ``prefill_up`` and ``another_worker_up`` leave the nodes out that have failed this request. A worker that has failed
    it is asked again only where nothing else is left. A ``forced`` route stays, on other nodes.
    """
    possible: dict[Route, bool] = {
        "split": prefill_up and another_worker_up,
        "gpu": prefill_up,
        "cpu": another_worker_up,
    }
    ways: tuple[Route, ...] = tuple(
        route for route, can in possible.items() if can and route not in barred and forced in (None, route)
    )
    if not ways and forced is None and some_worker_up and "cpu" not in barred:
        return ("cpu",)
    return ways


def context_tokens(route: Route, cluster: Cluster, sequence_cells: int = 0) -> int:
    """Longest prompt plus answer that ``route`` takes; of a worker's cells one sequence may hold ``sequence_cells``.

    0: all of them.
    vLLM wants room for one more token than the prompt even when it only prefills.
    """
    vllm, llama = cluster.prefill.max_model_len - 1, sequence_cells or cluster.decode.num_cells
    return {"gpu": vllm, "cpu": llama, "split": min(vllm, llama)}[route]


def fit(prompt_tokens: int, max_tokens: int | None, context: int, choices: int = 1) -> int:
    """``max_tokens``, or what the context leaves to each of ``choices`` that share it.

    Raises :class:`ContextLengthError` if there is no room.
    """
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + choices * wanted > context:
        times = f" {choices} times" if choices > 1 else ""
        raise ContextLengthError(
            f"the context is {context} tokens, but the prompt has {prompt_tokens} and max_tokens asks for {wanted}"
            f"{times}; shorten the prompt or lower max_tokens",
            "max_tokens" if prompt_tokens < context else "messages",
        )
    return (context - prompt_tokens) // choices if max_tokens is None else max_tokens
