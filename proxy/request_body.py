"""Bodies of requests: read within bounds, and checked against a schema."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from proxy.failures import BodySizeError
from transfer.errors import RequestError

MAX_BODY_BYTES = 8 << 20
BODY_S = 30.0

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, kind: type[M]) -> M:
    """The body of ``request`` as a ``kind``.

    Raises :class:`RequestError` naming the field that is wrong, and :class:`BodySizeError`.
    """
    try:
        return kind.model_validate_json(await _bytes(request))
    except ValidationError as error:
        raise _first_error(error) from None


async def _bytes(request: Request) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise BodySizeError(f"the request body is over {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise RequestError(f"the request body did not arrive within {BODY_S:g} s") from None
    return bytes(data)


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the request body is not JSON: {first['msg']}")
    if not first["loc"]:
        return RequestError(f"the request body is not a JSON object: {first['msg']}")
    where = ".".join(str(part) for part in first["loc"])
    return RequestError(f"{where}: {first['msg']}", str(first["loc"][0]))
