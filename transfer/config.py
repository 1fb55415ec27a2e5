"""The cluster file: one TOML that every node reads, parsed once into a frozen, validated object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import structlog

from transfer import codecs, config_errors
from transfer.errors import CodecError, ConfigError
from transfer.layout import CellType
from transfer.seal import SealName

log = structlog.get_logger()

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NumaSetting = Literal["auto", "off"] | Annotated[int, msgspec.Meta(ge=0)]
CellLayout = Literal["unified", "streams"]
AUTO_CODEC = "auto"
MAX_PREFILL_NODES = 64
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
PolicyName = Literal["min_ttft", "min_e2e", "max_goodput", "round_robin"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's tables: unknown keys are refused by name."""


class Pair(Section, frozen=True, kw_only=True):
    """The model pair: one set of weights as a Hugging Face directory for vLLM and a GGUF for llama.cpp."""

    name: str
    hf_dir: str
    gguf: str


class Prefill(Section, frozen=True, kw_only=True):
    """The vLLM nodes. ``kv_cache_gib`` is vLLM's cache on a CPU; on a GPU ``gpu_memory_utilization`` rules.

    Each node listens at its own ``host`` and ``port``. The proxy looks for them at ``nodes``, each ``HOST:PORT``, or
    where there are none, for the only one at ``host`` and ``port``. All else is the same for all nodes.

    ``max_step_tokens`` is vLLM's ``max_num_batched_tokens``. ``sender_mib`` bounds the KV that waits for the wire: at
    half of it vLLM defers new requests, at all of it a transfer fails. Steps whose forward is held up by exporting for
    longer than ``export_budget_ms`` are counted and logged. Without ``export`` any model will do, no KV leaves vLLM and
    no request takes route ``split``.
    """

    host: str = "127.0.0.1"
    port: Port = 8101
    nodes: tuple[str, ...] = ()
    max_model_len: Count = 4096
    max_step_tokens: Count = 2048
    kv_cache_gib: Count = 1
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    prefix_caching: bool = True
    export: bool = True
    sender_mib: Count = 1024
    export_budget_ms: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    extra_args: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the proxy finds the nodes, each ``HOST:PORT``."""
        return self.nodes or (f"{self.host}:{self.port}",)


class Decode(Section, frozen=True, kw_only=True):
    """The llama.cpp node. ``advertise_host`` is the name under which the prefill node reaches it.

    The prefill node introduces itself at ``kv_control_port`` and sends KV to ``kv_port``. ``threads`` 0 takes every
    physical core the process may use. ``landing_mib`` bounds chunks that wait for injection, ``pool_mib`` the KV of
    finished requests that is kept for prompts that begin the same; with 0 no prompt reuses anything.

    ``numa`` is the number of the NUMA node to bind the worker to, ``off``, or ``auto``: one bound worker for each node,
    where there are several; on a host of one, threads are pinned if they take every core. Worker k of several adds 10 k
    to each port, 0 stays 0. A worker that is asked to end (SIGTERM) gives the requests that run ``drain_s`` to finish.

    Weights are locked in memory with ``mlock`` and what is allocated lies in huge pages with ``huge_pages``, where the
    host allows it. They are read into memory of the worker's own, which decodes faster; with ``mmap`` they are the
    file's pages, which workers that are bound to no node share. ``batch_threads`` compute batches of more than one
    token, 0: as many as ``threads``. Threads at barriers look ``spin_count`` times before they sleep. ``profile`` names
    a file of ``isthmus measure decode --tune``, whose settings take the place of those here.

    With ``cell_layout`` ``unified`` every sequence takes of ``num_cells`` what it needs, KV lands in them chunk by
    chunk, and prompts share cells. With ``streams`` each of ``max_sequences`` has an equal part to itself: steps over
    many sequences are faster, KV gathers in RAM (part of ``landing_mib``) and lands whole, and prefixes come from RAM.
    ``flash_attention`` may be off there.

    At most ``max_queued`` requests wait for cells. A request is admitted when there are cells for its prompt and for
    ``promised_share`` of its ``max_tokens``; below 1, answers that outgrow that may have to wait in RAM for each other,
    the newest first; in streams all is promised. ``speculate`` has tokens guessed, at most ``speculate_tokens`` at a
    time, from the text so far or by the model in ``draft_gguf``: ``auto`` where that is measured to be faster. KV that
    leaves RAM goes to ``disk_pool_mib`` of files in ``disk_pool_dir``, and to the Redis-protocol server at
    ``shared_pool_url``; neither is used where its name is empty.
    """

    host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    control_port: Port = 8102
    kv_port: Port = 8103
    kv_control_port: Port = 8104
    num_cells: Count = 16384
    max_sequences: Annotated[int, msgspec.Meta(ge=1, le=255)] = 16
    cell_layout: CellLayout = "unified"
    flash_attention: bool = True
    cell_type: CellType = "f16"
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    prefill_batch_tokens: Count = 512
    landing_mib: Count = 1024
    pool_mib: Annotated[int, msgspec.Meta(ge=0)] = 1024
    numa: NumaSetting = "auto"
    drain_s: Seconds = 10.0
    mlock: bool = True
    huge_pages: bool = True
    mmap: bool = False
    batch_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    spin_count: Annotated[int, msgspec.Meta(ge=0)] = 1000
    profile: str = ""
    max_queued: Annotated[int, msgspec.Meta(ge=0)] = 64
    promised_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    speculate: Literal["auto", "off", "always"] = "auto"
    speculate_tokens: Annotated[int, msgspec.Meta(ge=1, le=64)] = 15
    draft_gguf: str = ""
    disk_pool_dir: str = ""
    disk_pool_mib: Annotated[int, msgspec.Meta(ge=0)] = 0
    shared_pool_url: str = ""


class Proxy(Section, frozen=True, kw_only=True):
    """The HTTP endpoint. At most ``max_running`` requests run and ``max_queued`` wait; more get 503.

    Decode workers announce themselves at ``registry_port``; ``advertise_host`` is the name under which they reach it.
    With port 0 nobody does, and the one in ``[decode]`` is the only one.

    ``api_keys_file`` holds the hashes of the keys that are let in, each for ``requests_per_minute`` and
    ``tokens_per_minute`` (0: any number). ``tls_cert`` and ``tls_key`` are PEM files; without them HTTP is plain. A
    proxy that is asked to end (SIGTERM) gives open requests ``drain_s``.

    The last ``ledger_entries`` requests are in memory, ``ledger_rows`` in the SQLite file ``ledger_file``; spans go to
    ``otlp_endpoint``. ``policy`` chooses routes, within the objectives ``slo_ttft_ms`` and ``slo_tpot_ms`` (0: none);
    its estimates start from result files in the folder ``measurements``. When the nodes are idle, a ``shadow_share``
    of requests is run again on another route to test them, and after a ``parity_share`` of split answers the worker
    computes the prompt itself: a codec whose KV changes the next token's distribution by more than ``parity_max_kl``
    nats is switched off. KV prefixes serve the API key that brought them, or, with ``share_prefixes``, all.
    ``/v1/embeddings`` is passed on to the engine at ``embeddings_url``.
    """

    host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    port: Port = 8100
    registry_port: Port = 8105
    max_running: Count = 16
    max_queued: Count = 256
    drain_s: Seconds = 30.0
    api_keys_file: str = ""
    requests_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0
    tls_cert: str = ""
    tls_key: str = ""
    ledger_entries: Count = 1000
    ledger_file: str = ""
    ledger_rows: Count = 1_000_000
    otlp_endpoint: str = ""
    embeddings_url: str = ""
    measurements: str = ""
    policy: PolicyName = "min_e2e"
    slo_ttft_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    slo_tpot_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    shadow_share: Share = 0.0
    parity_share: Share = 0.02
    parity_max_kl: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    share_prefixes: bool = False


class Link(Section, frozen=True, kw_only=True):
    """The KV plane between prefill and decode.

    A request may have ``credit_chunks`` chunks of ``chunk_tokens`` tokens on the way: that bounds its landing memory,
    and the tokens of a prefill step whose layers can leave while later ones are computed. ``seal`` protects the frames:
    ``aes-gcm`` hides and authenticates them, ``integrity`` only authenticates, ``none`` does neither. ``codec`` is how
    KV travels where a request does not say; ``auto`` takes what the worker's cells hold: ``raw``, or their own rows.
    """

    codec: str = AUTO_CODEC
    seal: SealName = "aes-gcm"
    chunk_tokens: Count = 1024
    credit_chunks: Count = 2
    frame_mib: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    transfer_deadline_s: Seconds = 60.0


class Keys(Section, frozen=True, kw_only=True):
    """Folder of this host's CURVE keys (``isthmus keys make``); empty: control sockets speak in the clear."""

    dir: str = ""


class Cluster(Section, frozen=True, kw_only=True):
    """The whole file."""

    pair: Pair
    prefill: Prefill = Prefill()
    decode: Decode = Decode()
    proxy: Proxy = Proxy()
    link: Link = Link()
    keys: Keys = Keys()


def load(path: Path) -> Cluster:
    """Read a cluster file. Relative paths are taken from the file's folder.

    Raises :class:`ConfigError` naming the file, the line, the key and what is wrong with it.
    """
    try:
        toml = path.read_text()
        cluster = msgspec.toml.decode(toml, type=Cluster)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {config_errors.explain(error, toml, Cluster)}") from None
    try:
        if cluster.link.codec != AUTO_CODEC:
            codecs.for_cells(cluster.link.codec, cluster.decode.cell_type)
    except CodecError as error:
        raise ConfigError(f"{path}: {error} - at `$.link.codec`") from None
    if wrong := config_errors.wrong_nodes(cluster.prefill.nodes, MAX_PREFILL_NODES):
        raise ConfigError(f"{path}: {config_errors.explain(ValueError(wrong), toml, Cluster)}")
    base = path.resolve().parent
    pair = msgspec.structs.replace(
        cluster.pair, hf_dir=str(base / cluster.pair.hf_dir), gguf=str(base / cluster.pair.gguf)
    )
    for key, found in (("hf_dir", Path(pair.hf_dir).is_dir()), ("gguf", Path(pair.gguf).is_file())):
        if not found:
            raise ConfigError(f"{path}: {getattr(pair, key)} does not exist - at `$.pair.{key}`")
    keys = Keys(dir=str(base / cluster.keys.dir)) if cluster.keys.dir else cluster.keys
    decode = cluster.decode
    named = {key: getattr(decode, key) for key in ("profile", "draft_gguf", "disk_pool_dir") if getattr(decode, key)}
    decode = msgspec.structs.replace(decode, **{key: str(base / name) for key, name in named.items()})
    return msgspec.structs.replace(cluster, pair=pair, decode=decode, keys=keys, proxy=_with_files(cluster.proxy, path))


def _with_files(proxy: Proxy, path: Path) -> Proxy:
    if bool(proxy.tls_cert) != bool(proxy.tls_key):
        raise ConfigError(f"{path}: TLS needs both tls_cert and tls_key - at `$.proxy`")
    named = {key: getattr(proxy, key) for key in ("api_keys_file", "tls_cert", "tls_key") if getattr(proxy, key)}
    found = {key: path.resolve().parent / name for key, name in named.items()}
    for key, file in found.items():
        if not file.is_file():
            raise ConfigError(f"{path}: {file} does not exist - at `$.proxy.{key}`")
    if proxy.ledger_file:
        found["ledger_file"] = path.resolve().parent / proxy.ledger_file
    if proxy.measurements:
        found["measurements"] = path.resolve().parent / proxy.measurements
    return msgspec.structs.replace(proxy, **{key: str(file) for key, file in found.items()})


def keys_folder(cluster: Cluster) -> Path | None:
    """Where a node's keys are, None if it has none; :class:`ConfigError` if frames are to be sealed without them."""
    if cluster.link.seal == "none":
        log.warning("KV travels unprotected: [link] seal is none", control="CURVE" if cluster.keys.dir else "open")
    elif not cluster.keys.dir:
        raise ConfigError(
            f"KV frames are sealed ({cluster.link.seal}), which needs keys: make some with `isthmus keys make DIR` and"
            ' set `dir` in [keys], or choose `seal = "none"` in [link] where nobody else is on the link'
        )
    return Path(cluster.keys.dir) if cluster.keys.dir else None


def with_numa(cluster: Cluster, setting: str) -> Cluster:
    """``cluster`` with ``[decode] numa`` set to what a command line says; :class:`ConfigError` if that is no value."""
    try:
        numa = msgspec.convert(int(setting) if setting.isdecimal() else setting, NumaSetting)
    except msgspec.ValidationError:
        raise ConfigError(f"{setting!r} is neither a NUMA node's number nor auto nor off - at --numa-node") from None
    return msgspec.structs.replace(cluster, decode=msgspec.structs.replace(cluster.decode, numa=numa))


def dump(cluster: Cluster) -> bytes:
    """The cluster as TOML that :func:`load` reads back."""
    return msgspec.toml.encode(cluster)
