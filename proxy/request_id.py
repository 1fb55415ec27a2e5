"""``X-Request-Id``: the client's, if it says a good one, or ours; every answer carries it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from transfer.errors import RequestError

HEADER = "X-Request-Id"
_FORM = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def of(headers: Mapping[str, str]) -> str:
    """The id of a request with ``headers``; :class:`RequestError` if the client's has another form."""
    said = headers.get(HEADER)
    if said and not _FORM.fullmatch(said):
        raise RequestError("the request id is 1 to 64 letters, digits, or . _ : -", HEADER)
    return said or uuid.uuid4().hex


def of_refused(headers: Mapping[str, str]) -> str:
    """The id for an answer that refuses a request, whatever the client says."""
    try:
        return of(headers)
    except RequestError:
        return uuid.uuid4().hex
