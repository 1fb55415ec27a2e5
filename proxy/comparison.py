"""What a worker predicts after a prompt: by its own prefill, and by KV that comes from vLLM for nobody's answer."""

from __future__ import annotations

import uuid

import structlog

from proxy.decode_node import DecodeNode
from proxy.prefill_node import PrefillNode
from proxy.witness import TOP
from transfer.errors import EngineError
from transfer.messages import Reserve, Sampling

RESERVE_S = 10.0
PREFILL_S = 300.0
_SAMPLING = Sampling(max_tokens=1, temperature=0.0, logprobs=TOP, ignore_eos=True)

Top = tuple[tuple[int, float], ...]

log = structlog.get_logger()


async def own_prediction(node: DecodeNode, tokens: list[int]) -> Top | None:
    """The likeliest next tokens when ``node`` computes all of ``tokens`` itself; None if it did not."""
    request_id = f"parity-{uuid.uuid4().hex}"
    reserve = Reserve(
        request_id=request_id,
        prompt=tokens,
        sampling=_SAMPLING,
        source="local",
        reuse=False,
        deadline_ms=round(PREFILL_S * 1000),
    )
    async with node.conversation(request_id, 1, cells=len(tokens) + 1) as conversation:
        ticket = await conversation.reserve(reserve, RESERVE_S)
        if ticket.reused_tokens:
            log.warning("a worker reuses KV where it was asked not to; nothing is compared", worker=node.name)
            return None
        await conversation.start(None, first_text_sent=False)
        said = await conversation.tokens(PREFILL_S)
        return said.logprobs[0].top if said.logprobs else None


async def prediction_by_wire(
    prefill: PrefillNode, node: DecodeNode, codec: str, tokens: list[int], tenant: str
) -> Top | None:
    """The same when the KV of ``tokens`` comes from ``prefill`` by ``codec``, as in route split; None if not all came.

    vLLM may use what it has cached for ``tenant``; what the worker keeps serves nobody.
    """
    request_id = f"probe-{uuid.uuid4().hex}"
    reserve = Reserve(
        request_id=request_id,
        prompt=tokens,
        sampling=_SAMPLING,
        source="kv",
        codec=codec,
        reuse=False,
        deadline_ms=round(PREFILL_S * 1000),
        tenant=request_id,
    )
    async with node.conversation(request_id, 1, cells=len(tokens) + 1) as conversation:
        ticket = await conversation.reserve(reserve, RESERVE_S)
        ask = prefill.prefill(request_id, tokens, _SAMPLING, ticket, PREFILL_S, tenant=tenant)
        first = await conversation.guard(ask)
        if first.export_error:
            raise EngineError(f"the KV was not exported: {first.export_error}")
        await conversation.start(None, first_text_sent=False)
        said = await conversation.tokens(PREFILL_S)
        return said.logprobs[0].top if said.logprobs and not ticket.reused_tokens else None
