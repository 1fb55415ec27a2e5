"""The whole stack on this host: prefill node, decode worker and proxy as three supervised processes."""

from __future__ import annotations

import os
import shutil
import ssl
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx
import msgspec
import zmq
from rich.console import Console

from isthmus.children import Child, Children, terminate_as_interrupt
from isthmus.ports import free_ports
from isthmus.progress import starting
from transfer import keys
from transfer.config import Cluster, Decode, Keys, Pair, Prefill, Proxy, dump
from transfer.errors import ProtocolError
from transfer.messages import Hello, Ping, Status, decode_from_worker, encode

# The first start on a small machine compiles the model, which takes minutes.
START_DEADLINE_S = 600.0
GRACE_S = 15.0
PROBE_S = 0.5


class Stack:
    """``with Stack(cluster, log_dir) as stack``: inside, all three nodes are healthy; outside, none is left.

    Entering raises :class:`~transfer.errors.EngineError` with the last lines of the node that died or was late. Log
    files are ``prefill.log``, ``decode.log`` and ``proxy.log`` in ``log_dir``, which must exist.
    """

    def __init__(self, cluster: Cluster, log_dir: Path, *, console: Console | None = None) -> None:
        self._cluster = cluster
        self._log_dir = log_dir
        self._console = console or Console(stderr=True, quiet=True)
        self._exits = ExitStack()
        self._children: Children

    @property
    def proxy_url(self) -> str:
        """Where clients connect."""
        return _proxy_url(self._cluster)

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-")))
            cluster = with_keys(self._cluster, folder / "keys")
            config = folder / "isthmus.toml"
            config.write_bytes(dump(cluster))
            probes = exits.enter_context(_Probes(cluster))
            # Last in, so first out: a SIGTERM that comes while the children end finds them still being waited for.
            exits.enter_context(terminate_as_interrupt())
            self._children = exits.enter_context(
                Children(_nodes(config, probes), self._log_dir, start_deadline_s=START_DEADLINE_S, grace_s=GRACE_S)
            )
            with starting(self._console) as show:
                self._children.start(show)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def require_alive(self) -> None:
        """Raise :class:`~transfer.errors.EngineError` if a node has died."""
        self._children.require_alive()

    def wait(self) -> None:
        """Block until a node dies, which is an error, or a signal comes, which is ``KeyboardInterrupt``."""
        self._children.wait()


def run(cluster: Cluster) -> None:
    """Bring the stack up and keep it up until Ctrl-C or SIGTERM; logs survive only a failure, the ledger always."""
    cluster = with_ledger(cluster, state_folder() / f"ledger-{cluster.proxy.port}.sqlite")
    console = Console(stderr=True)
    log_dir = Path(tempfile.mkdtemp(prefix="isthmus-logs-"))
    console.print(f"logs in {log_dir}", highlight=False)
    with Stack(cluster, log_dir, console=console) as stack:
        console.print(f"{cluster.pair.name} answers at {stack.proxy_url}/v1; Ctrl-C ends it", highlight=False)
        try:
            stack.wait()
        except KeyboardInterrupt:
            console.print("ending")
    shutil.rmtree(log_dir)


def cluster_on_free_ports(pair: Pair) -> Cluster:
    """The default cluster for ``pair`` on loopback, on ports that nothing listens on now."""
    prefill, control, kv, kv_control, proxy, registry = free_ports(6)
    return Cluster(
        pair=pair,
        prefill=Prefill(port=prefill),
        decode=Decode(control_port=control, kv_port=kv, kv_control_port=kv_control),
        proxy=Proxy(port=proxy, registry_port=registry),
    )


def with_ledger(cluster: Cluster, file: Path) -> Cluster:
    """``cluster``, with its ledger in ``file`` if it keeps it nowhere else."""
    if cluster.proxy.ledger_file:
        return cluster
    return msgspec.structs.replace(cluster, proxy=msgspec.structs.replace(cluster.proxy, ledger_file=str(file)))


def state_folder() -> Path:
    """Where what outlives a run belongs, made if need be (the XDG Base Directory Specification)."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "isthmus"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_keys(cluster: Cluster, folder: Path) -> Cluster:
    """``cluster``, with keys made in ``folder`` if it has none."""
    if cluster.keys.dir:
        return cluster
    keys.make(folder)
    return msgspec.structs.replace(cluster, keys=Keys(dir=str(folder)))


def _nodes(config: Path, probes: _Probes) -> list[Child]:
    def command(node: str) -> list[str]:
        # -P: a folder named `proxy` where the user happens to be must not shadow ours.
        return [sys.executable, "-P", "-m", "isthmus", node, "--config", str(config)]

    return [
        # First and alone: it times its own prefill at start, for the ledger's estimates.
        Child(name="decode", command=command("decode"), is_healthy=probes.decode),
        Child(name="prefill", command=command("prefill"), is_healthy=probes.prefill, after="decode"),
        Child(name="proxy", command=command("proxy"), is_healthy=probes.proxy, after="decode"),
    ]


def _proxy_url(cluster: Cluster) -> str:
    scheme = "https" if cluster.proxy.tls_cert else "http"
    return f"{scheme}://{_reachable(cluster.proxy.host)}:{cluster.proxy.port}"


def _own_certificate(cluster: Cluster) -> ssl.SSLContext | bool:
    """Trust in the proxy's certificate and no other, whatever name it was made out to; True where there is none."""
    if not cluster.proxy.tls_cert:
        return True
    context = ssl.create_default_context(cafile=cluster.proxy.tls_cert)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "*") else host  # noqa: S104


class _Probes:
    """Asks each node whether it is healthy; every question takes at most about ``PROBE_S``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._keys = keys.client(Path(cluster.keys.dir), "proxy") if cluster.keys.dir else None
        self._http = httpx.Client(timeout=PROBE_S, trust_env=False, verify=_own_certificate(cluster))
        self._zmq = zmq.Context()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._zmq.destroy(linger=0)

    def prefill(self) -> bool:
        """Whether vLLM answers ``GET /health`` with 200, as it does once its engine runs."""
        prefill = self._cluster.prefill
        return self._get(f"http://{_reachable(prefill.host)}:{prefill.port}/health") is not None

    def decode(self) -> bool:
        """Whether the worker tells its status on the control plane."""
        decode = self._cluster.decode
        with self._zmq.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            if self._keys is not None:
                keys.secure_client(dealer, self._keys)
            dealer.connect(f"tcp://{_reachable(decode.host)}:{decode.control_port}")
            dealer.send(encode(Hello()))
            dealer.send(encode(Ping()))
            while dealer.poll(int(PROBE_S * 1000)):
                try:
                    if isinstance(decode_from_worker(dealer.recv()), Status):
                        return True
                except ProtocolError:
                    return False
            return False

    def proxy(self) -> bool:
        """Whether the proxy answers and has both nodes."""
        health = self._get(f"{_proxy_url(self._cluster)}/health")
        try:
            state = msgspec.json.decode(health or b"{}", type=dict[str, object])
        except msgspec.DecodeError:
            return False
        return state.get("prefill") == "up" and state.get("decode") == "up"

    def _get(self, url: str) -> bytes | None:
        try:
            answer = self._http.get(url)
        except httpx.HTTPError:
            return None
        return answer.content if answer.is_success else None
