"""Interfaces, the path to another node, and ports."""

from __future__ import annotations

import errno
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from isthmus.checks.finding import Finding, text
from transfer.errors import ConfigError

JUMBO_MTU = 9000
# From here on the per-packet work of 1500-byte frames shows in CPU seconds.
_FAST_MBIT_PER_S = 10_000
# include/uapi/linux/in.h; Python has no names for them.
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE, _IP_MTU = 10, 3, 14
_IP_AND_UDP_BYTES = 28
# Nobody listens at the discard port, so a peer that a probe reaches says so (RFC 1122, 3.2.2.1).
_DISCARD_PORT = 9


def interfaces(root: Path) -> Iterator[Finding]:
    """The MTU of every interface that is up, loopback left out."""
    why = "jumbo frames spare both ends most of the per-packet work of 10 Gbit/s and more"
    for folder in sorted((root / "sys/class/net").glob("*")):
        if folder.name == "lo" or text(folder / "operstate") != "up":
            continue
        mtu, speed = int(text(folder / "mtu") or 0), int(text(folder / "speed") or -1)
        rate = f"{speed:,} Mbit/s" if speed > 0 else "speed unknown"
        check, seen = f"MTU of {folder.name}", f"{mtu}, {rate}"
        if speed >= _FAST_MBIT_PER_S and mtu < JUMBO_MTU:
            fix = f"ip link set {folder.name} mtu {JUMBO_MTU}, on both nodes and the switch between them"
            yield Finding(check, "warn", seen, why, fix)
        else:
            yield Finding(check, "ok", seen, why)


def rings(root: Path) -> Iterator[Finding]:
    """Whether receive rings are as large as the card allows, on interfaces of 10 Gbit/s and more."""
    program = shutil.which("ethtool")
    for folder in sorted((root / "sys/class/net").glob("*")):
        if int(text(folder / "speed") or -1) < _FAST_MBIT_PER_S or text(folder / "operstate") != "up":
            continue
        if program is None:
            yield ring_size(folder.name, None)
            continue
        done = subprocess.run([program, "-g", folder.name], capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
        yield ring_size(folder.name, done.stdout)


def ring_size(interface: str, ethtool: str | None) -> Finding:
    """The receive ring of ``interface`` as ``ethtool -g`` prints it; None where there is no ethtool."""
    check, why = f"receive ring of {interface}", "a full ring drops packets in a burst, and TCP halves its window"
    if ethtool is None:
        return Finding(check, "unknown", "ethtool is not installed", why, "apt install ethtool")
    sizes = [int(size) for size in re.findall(r"^RX:\s+(\d+)$", ethtool, re.MULTILINE)]
    if len(sizes) != 2:
        return Finding(check, "unknown", "the driver does not say", why)
    largest, current = sizes
    if current < largest:
        return Finding(check, "warn", f"{current} of {largest}", why, f"ethtool -G {interface} rx {largest}")
    return Finding(check, "ok", str(current), why)


def path_mtu(peer: str, timeout_s: float = 1.0) -> Finding:
    """The largest IPv4 packet that reaches ``peer``, up to this interface's MTU, fragmenting forbidden (``man 7 ip``).

    Raises :class:`ConfigError` if ``peer`` has no IPv4 address.
    """
    check, why = f"path MTU to {peer}", "packets that a hop cannot pass on are lost in silence: transfers hang"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.settimeout(timeout_s)
        probe.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        try:
            probe.connect((peer, _DISCARD_PORT))
        except OSError as error:
            raise ConfigError(f"{peer} cannot be reached over IPv4: {error.strerror} - at --peer") from None
        mtu = int(probe.getsockopt(socket.IPPROTO_IP, _IP_MTU))
        for size in sorted({mtu, *(each for each in (JUMBO_MTU, 1500) if each < mtu)}, reverse=True):
            # A UDP datagram ends at 65,507 bytes, below loopback's MTU.
            if _arrives(probe, min(size - _IP_AND_UDP_BYTES, 65_507)):
                if size == mtu:
                    return Finding(check, "ok", f"{mtu}, all the way", why)
                fix = f"raise the MTU of the switch and of {peer} to {mtu}, or lower this interface's to {size}"
                return Finding(check, "fail", f"{size}; this interface has {mtu}", why, fix)
    return Finding(check, "unknown", f"{peer} does not answer probes; this interface has {mtu}", why)


def _arrives(probe: socket.socket, payload_bytes: int) -> bool:
    """Whether the peer answers a datagram of this size with "port unreachable", or with data."""
    try:
        probe.send(bytes(payload_bytes))
        probe.recv(1)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def ports(addresses: Mapping[str, tuple[str, int]]) -> Iterator[Finding]:
    """Whether each service's address, by its key in the cluster file, is free here or held by Isthmus itself."""
    why = "a service cannot start where another one listens"
    for key, (host, port) in addresses.items():
        check = f"port {port} ({key})"
        taken = _bind_error(host, port)
        if taken is None:
            yield Finding(check, "ok", "free", why)
        elif taken != errno.EADDRINUSE:
            yield Finding(check, "ok", f"{host} is not this host", why)
        else:
            command = _listener(port)
            if _is_ours(command):
                yield Finding(check, "ok", "an Isthmus service is running", why)
            else:
                fix = f"end it, or set another port at {key} in every node's cluster file"
                yield Finding(check, "fail", f"taken by {' '.join(command) or 'a process of another user'}", why, fix)


def _bind_error(host: str, port: int) -> int | None:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    with socket.socket(address[0], socket.SOCK_STREAM) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(address[4])
        except OSError as error:
            return error.errno
    return None


def _is_ours(command: Sequence[str]) -> bool:
    """Whether it is ``isthmus``, ``python -m isthmus`` or the vLLM server that ``isthmus prefill`` becomes."""
    return any(Path(word).name == "isthmus" or word.lower().startswith(("vllm.", "vllm::")) for word in command[:4])


def _listener(port: int) -> list[str]:
    """The command line of the process that listens at ``port``; empty where this user may not see it."""
    try:
        connections = psutil.net_connections("tcp")
        pids = [each.pid for each in connections if each.status == psutil.CONN_LISTEN and each.laddr.port == port]
        return list(psutil.Process(pids[0]).cmdline()) if pids and pids[0] else []
    except psutil.Error:
        return []
