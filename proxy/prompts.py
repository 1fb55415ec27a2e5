"""A request with several prompts: each goes its own way, and the answers are numbered as OpenAI numbers them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import NamedTuple

from proxy.gateway import Call, Gateway
from proxy.handoff import Piece, Pieces
from proxy.ledger import Account
from proxy.openai import CompletionBody

_PIECES_AHEAD = 64


class Part(NamedTuple):
    """One prompt of a request, and what serving it costs."""

    call: Call
    account: Account


def parts(call: Call, model: str) -> list[Part]:
    """``call`` with one prompt each; several prompts get request ids of their own."""
    body = call.body
    if not isinstance(body, CompletionBody) or len(body.prompt) == 1:
        return [Part(call, Account(call.request_id, model))]
    calls = [
        call._replace(request_id=f"{call.request_id}-{number}", body=one) for number, one in enumerate(body.apart())
    ]
    return [Part(one, Account(one.request_id, model)) for one in calls]


async def together(gateway: Gateway, served: list[Part]) -> Pieces:
    """The pieces of all parts as they come; choice ``c`` of part ``p`` is number ``p * choices + c``.

    The first part that fails ends the others.
    """
    if len(served) == 1:
        async with aclosing(_pieces(gateway, served[0])) as pieces:
            async for piece in pieces:
                yield piece
        return
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(_PIECES_AHEAD)
    tasks = [
        asyncio.create_task(_pump(gateway, part, number * part.call.body.choices, arrived))
        for number, part in enumerate(served)
    ]
    try:
        running = len(tasks)
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Piece() as piece:
                    yield piece
                case error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    gateway: Gateway, part: Part, first_choice: int, arrived: asyncio.Queue[Piece | BaseException | None]
) -> None:
    try:
        async with aclosing(_pieces(gateway, part)) as pieces:
            async for piece in pieces:
                await arrived.put(piece._replace(choice=first_choice + piece.choice))
    except Exception as error:  # noqa: BLE001 - handed on to whoever reads the queue
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _pieces(gateway: Gateway, part: Part) -> Pieces:
    """The answer to one part, after its prompt if the client wants that repeated and no engine does it."""
    body = part.call.body
    echo = isinstance(body, CompletionBody) and body.echo and not body.echoes_logprobs
    async with aclosing(gateway.pieces(part.call, part.account)) as pieces:
        async for piece in pieces:
            if echo:
                echo = False
                prompt = gateway.renderer.vocabulary.text(part.account.prompt)
                for choice in range(body.choices):
                    yield Piece(prompt, choice=choice)
            yield piece
