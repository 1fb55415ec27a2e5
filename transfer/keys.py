"""CURVE keys (RFC 26/CurveZMQ): who may speak to a decode worker, and how a socket is told.

A key folder holds one certificate for each node, ``NAME.key`` (public) and ``NAME.key_secret``, in the format of
``zmq.auth``. A name is a role, ``decode``, ``prefill`` or ``proxy``, with a suffix after a dash where a role has
several holders. The workers' control socket lets in the holders of ``proxy*`` keys, their KV control socket those of
``prefill*`` keys; all workers share the ``decode`` key.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

import structlog
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from transfer.errors import ConfigError

log = structlog.get_logger()

Role = Literal["decode", "prefill", "proxy"]
ROLES: tuple[Role, ...] = ("decode", "prefill", "proxy")
_NAME = re.compile(r"(decode|prefill|proxy)(-[a-z0-9-]+)?")


class ClientKeys(NamedTuple):
    """A client's pair, and the key that the worker must prove to hold; Z85 text."""

    public: bytes
    secret: bytes
    server: bytes


class ServerKeys(NamedTuple):
    """The workers' pair, and the folder whose public keys say who may come in."""

    public: bytes
    secret: bytes
    folder: Path


def make(folder: Path, names: tuple[str, ...] = ROLES) -> list[str]:
    """Make the pairs of ``names`` that ``folder`` lacks; returns those made. Existing keys are left alone.

    Raises :class:`ConfigError` for a name that does not begin with a role.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"key name {name!r} must be a role ({', '.join(ROLES)}), or ROLE-SUFFIX in a-z, 0-9 and -"
            )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / f"{name}.key_secret").exists()]
    for name in missing:
        before = os.umask(0o077)
        try:
            zmq.auth.create_certificates(folder, name)
        finally:
            os.umask(before)
        (folder / f"{name}.key").chmod(0o644)
    return missing


def client(folder: Path, name: str) -> ClientKeys:
    """The pair of the client ``name`` and the workers' public key; :class:`ConfigError` names what is missing."""
    public, secret = _pair(folder, name)
    return ClientKeys(public, secret, _load(folder / "decode.key")[0])


def server(folder: Path) -> ServerKeys:
    """The workers' pair; :class:`ConfigError` names what is missing."""
    return ServerKeys(*_pair(folder, "decode"), folder)


def allowed(folder: Path, role: Role) -> dict[bytes, str]:
    """Public keys (Z85) of a role's holders, with their names."""
    paths = sorted(folder.glob(f"{role}*.key"))
    return {_load(path)[0]: path.stem for path in paths if (found := _NAME.fullmatch(path.stem)) and found[1] == role}


def secure_client(socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Let ``socket``, not yet connected, speak CURVE."""
    socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys


def secure_server(socket: zmq.Socket[bytes], keys: ServerKeys, role: Role) -> None:
    """Let ``socket``, not yet bound, ask for keys of ``role``; its context needs a :class:`Doorkeeper`."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = role.encode()


class Doorkeeper:
    """Answers a context's ZAP requests (RFC 27) in a thread of its own until closed."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self._allowed = {role.encode(): allowed(keys.folder, role) for role in ROLES}
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        for role in ROLES:
            self._authenticator.configure_curve_callback(role, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the holder of public key ``key`` (Z85) may speak to the sockets of ``domain``; called by zmq.auth."""
        known = key in self._allowed.get(domain.encode(), {})
        if not known:
            log.warning("refused a peer: its key is not allowed here", domain=domain, key=key.decode(errors="replace"))
        return known

    def close(self) -> None:
        """Stop answering; call before the context is terminated."""
        self._authenticator.stop()


def _pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    path = folder / f"{name}.key_secret"
    public, secret = _load(path)
    if secret is None:
        raise ConfigError(f"{path} holds no secret key")
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read key {path} ({error}); make keys with: isthmus keys make {path.parent}"
        ) from None
