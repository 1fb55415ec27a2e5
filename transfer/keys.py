"""CURVE keys (ZeroMQ RFC 26): a folder of them, and how a socket is told.

The folder holds a certificate for each node in the format of ``zmq.auth``: ``NAME.key`` (public) and
``NAME.key_secret``. All workers share the name ``decode``. A client's name is its role, ``prefill`` or ``proxy``, with
a suffix after a dash where a role has several holders. A worker needs its own secret and every client's public key, a
client its own secret and ``decode.key``.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zmq
import zmq.auth
from zmq.utils import z85

from transfer.errors import ConfigError

Role = Literal["prefill", "proxy"]
SERVER = "decode"
ROLES: tuple[Role, ...] = ("prefill", "proxy")
_CLIENT = re.compile(r"(prefill|proxy)(-[a-z0-9-]+)?")


class ClientKeys(NamedTuple):
    """A client's pair, and the key that the worker must prove to hold; Z85 text."""

    public: bytes
    secret: bytes
    server: bytes


class ServerKeys(NamedTuple):
    """The workers' pair, and by role the public keys in ``folder`` that may come in, with their names; Z85 text."""

    public: bytes
    secret: bytes
    allowed: dict[Role, dict[bytes, str]]
    folder: Path


class Holder(NamedTuple):
    """One name in a key folder. ``public`` is Z85 text."""

    name: str
    public: str
    has_secret: bool


def make(folder: Path, clients: tuple[str, ...] = ()) -> list[str]:
    """Make the pairs of a worker, a prefill node, a proxy and ``clients`` that ``folder`` lacks; returns those made.

    What is there already, a public key alone included, is left alone. Raises :class:`ConfigError` for a client whose
    name does not begin with its role, and for a folder that cannot be written.
    """
    for name in clients:
        if not _CLIENT.fullmatch(name):
            raise ConfigError(f"client {name!r} must be named prefill-SUFFIX or proxy-SUFFIX, in a-z, 0-9 and -")
    names = [name for name in dict.fromkeys((SERVER, *ROLES, *clients)) if not _files(folder, name)]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            _make_pair(folder, name)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {folder}: {error.strerror}") from None
    return names


def holders(folder: Path) -> list[Holder]:
    """Everyone whose public key is in ``folder``, by name; :class:`ConfigError` for one that cannot be read."""
    if not folder.is_dir():
        raise ConfigError(f"there is no key folder {folder}; make it with: isthmus keys make {folder}")
    return [
        Holder(path.stem, _load(path)[0].decode(), path.with_suffix(".key_secret").exists())
        for path in sorted(folder.glob("*.key"))
        if path.stem == SERVER or _CLIENT.fullmatch(path.stem)
    ]


def client(folder: Path, role: Role) -> ClientKeys:
    """The pair of this node and the workers' public key.

    The pair is that of the name ``role``, or else of the one ``role-SUFFIX`` whose secret is here. Raises
    :class:`ConfigError` naming the file that is missing, unreadable or readable by others.
    """
    secrets = sorted(folder.glob(f"{role}-*.key_secret"))
    own = folder / f"{role}.key_secret"
    if not own.exists() and secrets:
        own, *more = secrets
        if more:
            raise ConfigError(f"{folder} holds the secrets of several {role} nodes; leave only this node's there")
    return ClientKeys(*_pair(own), _load(folder / f"{SERVER}.key")[0])


def server(folder: Path) -> ServerKeys:
    """The workers' pair and everyone whom they let in; raises :class:`ConfigError` as :func:`client` does."""
    public, secret = _pair(folder / f"{SERVER}.key_secret")
    allowed = allow_list(folder)
    for role, known in allowed.items():
        if not known:
            raise ConfigError(f"{folder} has no public key of a {role} node: copy its {role}.key there")
    return ServerKeys(public, secret, allowed, folder)


def allow_list(folder: Path) -> dict[Role, dict[bytes, str]]:
    """Names by public key (Z85) of those in ``folder`` who may come in, by role; raises what :func:`holders` raises."""
    allowed: dict[Role, dict[bytes, str]] = {role: {} for role in ROLES}
    for holder in holders(folder):
        for role in ROLES:
            if holder.name.split("-")[0] == role:
                allowed[role][holder.public.encode()] = holder.name
    return allowed


def secure_client(socket: zmq.Socket[Any], keys: ClientKeys) -> None:
    """Let ``socket``, not yet connected, speak CURVE. A worker that refuses its key is not asked again by ZeroMQ."""
    socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys


def secure_server(socket: zmq.Socket[bytes], keys: ServerKeys, role: Role) -> None:
    """Let ``socket``, not yet bound, ask for CURVE and for a key of ``role``.

    Its context needs a :class:`~transfer.doorkeeper.Doorkeeper` first: without one nobody comes in.
    """
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = role.encode()


def _files(folder: Path, name: str) -> list[Path]:
    return [path for ending in ("key", "key_secret") if (path := folder / f"{name}.{ending}").exists()]


def _make_pair(folder: Path, name: str) -> None:
    # Nobody sees a file before its mode is right, and an interruption leaves no half of a pair but a secret.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        public, secret = map(Path, zmq.auth.create_certificates(scratch, name))
        secret.chmod(0o600)
        public.chmod(0o644)
        secret.rename(folder / secret.name)
        public.rename(folder / public.name)


def _pair(path: Path) -> tuple[bytes, bytes]:
    public, secret = _load(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others; make new keys if they may have been, then: chmod 600 {path}")
    if secret is None:
        raise ConfigError(f"{path} holds no secret key")
    try:
        matches = zmq.curve_public(secret) == public
    except (ValueError, zmq.ZMQError):
        matches = False
    if not matches:
        raise ConfigError(f"{path}: the secret key does not belong to the public key")
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    if not path.exists():
        raise ConfigError(
            f"there is no key {path}; make keys with `isthmus keys make {path.parent}`, or copy those that were made"
        )
    try:
        public, secret = zmq.auth.load_certificate(path)
        if len(z85.decode(public)) != 32:
            raise ValueError(f"its public key has {len(public)} characters, not 40")
    except OSError as error:
        raise ConfigError(f"cannot read key {path}: {error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not a key: {error}") from None
    return public, secret
