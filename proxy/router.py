"""Which route a request takes: a pure decision, so that it can be replayed."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from proxy.failures import ContextLengthError
from transfer.config import Cluster
from transfer.errors import LinkError, RequestError

Route = Literal["split", "gpu", "cpu"]
Reason = Literal["forced", "both_up", "prefill_down", "decode_down", "kv_lost"]

HEADER = "X-Isthmus-Route"
ROUTES: tuple[Route, ...] = get_args(Route)
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


def choose(forced: Route | None, *, prefill_up: bool, decode_up: bool) -> Decision:
    """Split where both nodes are up, else the one that is; :class:`LinkError` if what is needed is down."""
    up = {"prefill": prefill_up, "decode": decode_up}
    if forced:
        down = [node for node in _NEEDS[forced] if not up[node]]
        if down:
            raise LinkError(f"route {forced} needs the {' and the '.join(down)} node, which is down")
        return Decision(forced, "forced")
    if prefill_up and decode_up:
        return Decision("split", "both_up")
    if prefill_up:
        return Decision("gpu", "decode_down")
    if decode_up:
        return Decision("cpu", "prefill_down")
    raise LinkError("the prefill node and the decode node are down")


def context_tokens(route: Route, cluster: Cluster) -> int:
    """Longest prompt plus answer that ``route`` takes.

    vLLM wants room for one more token than the prompt even when it only prefills.
    """
    vllm, llama = cluster.prefill.max_model_len - 1, cluster.decode.num_cells
    return {"gpu": vllm, "cpu": llama, "split": min(vllm, llama)}[route]


def fit(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """``max_tokens``, or what the context leaves; :class:`ContextLengthError` if there is no room."""
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > context:
        raise ContextLengthError(
            f"the context is {context} tokens, but the prompt has {prompt_tokens} and max_tokens asks for {wanted}; "
            "shorten the prompt or lower max_tokens",
            "max_tokens" if prompt_tokens < context else "messages",
        )
    return context - prompt_tokens if max_tokens is None else max_tokens
