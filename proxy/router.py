"""Which route a request takes: a pure decision, so that it can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from proxy import costs
from proxy.costs import PrefillTime
from proxy.failures import ContextLengthError
from transfer.codecs import CODECS
from transfer.config import AUTO_CODEC, Cluster
from transfer.errors import CodecError, LinkError, RequestError
from transfer.messages import Sampling, Status, Ticket

Route = Literal["split", "gpu", "cpu"]
Reason = Literal[
    "forced",
    "both_up",
    "prefill_down",
    "prefill_failing",
    "decode_down",
    "decode_failing",
    "only_vllm_can",
    "failed_over",
    "cached",
]

HEADER = "X-Isthmus-Route"
REASON_HEADER = "X-Isthmus-Reason"
CODEC_HEADER = "X-Isthmus-Codec"
ROUTES: tuple[Route, ...] = get_args(Route)
# Fewer than this a worker computes before vLLM's first frame has arrived.
ALWAYS_LOCAL_TOKENS = 32
_NEEDS = {"split": ("prefill", "decode"), "gpu": ("prefill",), "cpu": ("decode",)}


class Decision(NamedTuple):
    """The route and why it was taken; both are metric labels."""

    route: Route
    reason: Reason


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


def choose_codec(
    asked: str | None, configured: str, possible: Sequence[str], distrusted: Mapping[str, str] | None = None
) -> str:
    """How KV travels to a worker that takes the codecs ``possible``, the preferred one first.

    Those in ``distrusted`` are left out, for the reason given there; if that is the configured one, another is taken.
    Raises :class:`RequestError` if the one ``asked`` for is not possible, :class:`CodecError` if the ``configured`` one
    is not, or none is.
    """
    distrusted = distrusted or {}
    if asked in distrusted:
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


def choose(
    forced: Route | None,
    *,
    prefill_up: bool,
    decode_up: bool,
    barred: Mapping[Route, str] | None = None,
    prefill_failing: bool = False,
    decode_failing: bool = False,
) -> Decision:
    """Split where both nodes are up, else the one that is, but never a route that is ``barred`` (see :func:`bar`).

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
    if "split" in barred:
        if not prefill_up:
            raise LinkError(f"{barred['split']} needs the prefill node, which is down")
        return Decision("gpu", "forced" if forced else "only_vllm_can")
    if "gpu" in barred and not decode_up:
        raise LinkError(f"{barred['gpu']} needs the decode node, which is down")
    if forced:
        down = [node for node in _NEEDS[forced] if not up[node]]
        if down:
            raise LinkError(f"route {forced} needs the {' and the '.join(down)} node, which is down")
        return Decision(forced, "forced")
    if prefill_up and decode_up and prefill_failing != decode_failing:
        alone: Decision = Decision("cpu", "prefill_failing") if prefill_failing else Decision("gpu", "decode_failing")
        if alone.route not in barred:
            return alone
    if prefill_up and decode_up:
        return Decision("split", "both_up")
    if prefill_up:
        return Decision("gpu", "decode_down")
    if decode_up:
        return Decision("cpu", "prefill_down")
    raise LinkError("the prefill node and the decode node are down")


def go_on(
    forced: Route | None,
    *,
    prefill_up: bool,
    another_worker_up: bool,
    some_worker_up: bool,
    barred: Mapping[Route, str],
) -> Route | None:
    """The route on which an answer goes on after a node has failed it; None if there is none.

    ``prefill_up`` and ``another_worker_up`` leave the nodes out that have failed this request. vLLM has its prompt in
    its prefix cache, so routes with vLLM come first; a worker that has failed it is asked again only where nothing else
    is left. A ``forced`` route stays, on other nodes.
    """
    possible: dict[Route, bool] = {
        "split": prefill_up and another_worker_up,
        "gpu": prefill_up,
        "cpu": another_worker_up or (some_worker_up and forced is None),
    }
    return next(
        (route for route, can in possible.items() if can and route not in barred and forced in (None, route)), None
    )


def computes_the_rest(ticket: Ticket, prompt_tokens: int, status: Status | None, vllm: PrefillTime) -> bool:
    """Whether the worker, which has the prompt's beginning in its cells, had better compute the rest than vLLM."""
    missing_tokens = prompt_tokens - ticket.reused_tokens
    if not ticket.reused_tokens:
        return False
    if missing_tokens <= ALWAYS_LOCAL_TOKENS:
        return True
    here, there_ns = costs.cpu_prefill(missing_tokens, status), vllm.ns(missing_tokens)
    return here is not None and there_ns is not None and here.ns <= there_ns


def context_tokens(route: Route, cluster: Cluster) -> int:
    """Longest prompt plus answer that ``route`` takes.

    vLLM wants room for one more token than the prompt even when it only prefills.
    """
    vllm, llama = cluster.prefill.max_model_len - 1, cluster.decode.num_cells
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
