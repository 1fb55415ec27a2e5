"""Who may talk to the proxy, and how much of it: API keys, of which only hashes are kept.

The file has one line for each key: its name, the SHA-256 of the key in hex and, in any order, what it is allowed where
that is not what ``[proxy]`` says::

    alice 9f86d081...0a08 weight=2 requests_per_minute=60 tokens_per_minute=20000 max_running=4

Keys are 256 random bits, so a plain hash gives nothing away.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import structlog

from transfer.errors import ConfigError

ENVIRONMENT = "ISTHMUS_API_KEY"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})[ \t]+(?P<digest>[0-9a-f]{64})(?P<limits>([ \t]+[a-z_]+=[^ \t]+)*)")
_TENANT_BYTES = 16

log = structlog.get_logger()

Count = Annotated[int, msgspec.Meta(ge=0)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one key may use. Where keys compete for slots, each gets tokens by its ``weight``.

    ``requests_per_minute`` and ``tokens_per_minute`` stand in place of those in ``[proxy]`` (None), 0 is any number.
    At most ``max_running`` of its requests run at once, 0: as many as there are slots.
    """

    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_running: Count = 0


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is let in. ``tenant`` names it to engines, which share no KV between tenants.

    A tenant's name says nothing of the key, and is the same after a restart and at another proxy with the same file.
    """

    name: str
    tenant: str = ""
    limits: Limits = Limits()


# Everyone, where there are no keys.
NOBODY = ApiKey(name="")


class ApiKeys:
    """The keys that are let in, by the SHA-256 of each."""

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        self._keys = dict(keys)

    def __bool__(self) -> bool:
        """Whether there are any; without, everyone is let in."""
        return bool(self._keys)

    def holder(self, presented: str) -> ApiKey | None:
        """The key that was presented, None if it is none of ours. Takes as long for any wrong key."""
        digest = _digest(presented)
        found = None
        for expected, key in self._keys.items():
            if hmac.compare_digest(digest, expected):
                found = key
        return found


def load(path: str) -> ApiKeys:
    """The keys in the file ``path`` (empty for none) and the one in the environment, which is called ``environment``.

    Raises :class:`ConfigError` naming the file and the line that is wrong.
    """
    keys = _read(Path(path)) if path else {}
    if alone := os.environ.get(ENVIRONMENT):
        keys[_digest(alone)] = _named("environment", _digest(alone), Limits())
    if not keys:
        log.warning("no API keys: whoever reaches the proxy may use it", fix="isthmus api-key make, api_keys_file")
    return ApiKeys(keys)


def make(path: Path, name: str, limits: Limits | None = None) -> str:
    """Add a key called ``name`` to the file ``path`` and return it; it cannot be had a second time.

    Raises :class:`ConfigError` if there is one of that name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a key's name is 1 to 64 letters, digits, or . _ -, not {name!r}")
    if path.exists() and name in (key.name for key in _read(path).values()):
        raise ConfigError(f"{path} has a key called {name!r}; take its line out first, or choose another name")
    key = f"isthmus-{secrets.token_urlsafe(32)}"
    said = {} if limits is None else msgspec.structs.asdict(limits)
    defaults = msgspec.structs.asdict(Limits())
    written = "".join(f" {field}={value:g}" for field, value in said.items() if value != defaults[field])
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(f"{name} {_digest(key)}{written}\n")
    return key


def _read(path: Path) -> dict[str, ApiKey]:
    """The keys of a file by their digests."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error} - at `$.proxy.api_keys_file`") from None
    keys: dict[str, ApiKey] = {}
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match["name"] in names:
            what = "names a key twice" if match else "is not NAME SHA256-IN-HEX [LIMIT=NUMBER ...]"
            raise ConfigError(f"{path}, line {number} {what}; `isthmus api-key make` writes such lines")
        names.add(match["name"])
        keys[match["digest"]] = _named(match["name"], match["digest"], _limits(match["limits"], path, number))
    return keys


def _limits(text: str, path: Path, number: int) -> Limits:
    said = dict(part.split("=", 1) for part in text.split())
    try:
        return msgspec.convert(said, Limits, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}, line {number}: {error}") from None


def _named(name: str, digest: str, limits: Limits) -> ApiKey:
    tenant = hashlib.blake2b(b"tenant", key=bytes.fromhex(digest), digest_size=_TENANT_BYTES).hexdigest()
    return ApiKey(name=name, tenant=tenant, limits=limits)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
