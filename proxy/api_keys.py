"""Who may talk to the proxy: API keys, of which only hashes are kept.

The file has one line for each key: a name, a blank and the SHA-256 of the key in hex. Keys are 256 random bits, so a
plain hash gives nothing away.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import structlog

from transfer.errors import ConfigError

ENVIRONMENT = "ISTHMUS_API_KEY"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})[ \t]+(?P<digest>[0-9a-f]{64})")

log = structlog.get_logger()


class ApiKeys:
    """The keys that are let in, as names and hashes."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = dict(digests)

    def __bool__(self) -> bool:
        """Whether there are any; without, everyone is let in."""
        return bool(self._digests)

    def holder(self, presented: str) -> str | None:
        """The name of the key that was presented, None if it is none of ours. Takes as long for any wrong key."""
        digest = _digest(presented)
        found = None
        for name, expected in self._digests.items():
            if hmac.compare_digest(digest, expected):
                found = name
        return found


def load(path: str) -> ApiKeys:
    """The keys in the file ``path`` (empty for none) and the one in the environment, which is called ``environment``.

    Raises :class:`ConfigError` naming the file and the line that is wrong.
    """
    digests = _read(Path(path)) if path else {}
    if alone := os.environ.get(ENVIRONMENT):
        digests["environment"] = _digest(alone)
    if not digests:
        log.warning("no API keys: whoever reaches the proxy may use it", fix="isthmus api-key make, api_keys_file")
    return ApiKeys(digests)


def make(path: Path, name: str) -> str:
    """Add a key called ``name`` to the file ``path`` and return it; it cannot be had a second time.

    Raises :class:`ConfigError` if there is one of that name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a key's name is 1 to 64 letters, digits, or . _ -, not {name!r}")
    if path.exists() and name in _read(path):
        raise ConfigError(f"{path} has a key called {name!r}; take its line out first, or choose another name")
    key = f"isthmus-{secrets.token_urlsafe(32)}"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(f"{name} {_digest(key)}\n")
    return key


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error} - at `$.proxy.api_keys_file`") from None
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match["name"] in digests:
            what = "names a key twice" if match else "is not NAME SHA256-IN-HEX"
            raise ConfigError(f"{path}, line {number} {what}; `isthmus api-key make` writes such lines")
        digests[match["name"]] = match["digest"]
    return digests


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
