"""The result files of `isthmus measure`, as far as the router reads them, and whether they are about this cluster."""

from __future__ import annotations

import ipaddress
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from transfer.config import Cluster

SCHEMA = "isthmus.measure/1"
MAX_FILE_BYTES = 64 << 20

S = TypeVar("S")
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Cpu(msgspec.Struct):
    """What a machine is told apart by."""

    model: str
    logical_cores: int


class _Environment(msgspec.Struct):
    cpu: Cpu
    gpu: list[str] = []


class Envelope(msgspec.Struct):
    """What all results have."""

    schema: str
    measure: str
    environment: _Environment
    summary: msgspec.Raw
    command: list[str] = []
    samples: list[dict[str, Any]] = []


class Rates(msgspec.Struct):
    """Tokens a second, of prefill by prompt tokens and way, of decode by way and sequences."""

    tokens_per_s: dict[str, dict[str, Positive]]


class _Median(msgspec.Struct):
    p50: Positive


class _Times(msgspec.Struct):
    ttft_s: _Median
    tpot_s: _Median


class _Load(msgspec.Struct):
    prompt_tokens: int
    output_tokens: int


class _Workload(msgspec.Struct):
    workload: _Load
    options: dict[str, dict[str, _Times]]


class _Stack(msgspec.Struct):
    model: str


class Crossover(msgspec.Struct):
    """Seconds by workload, way to serve and requests at a time."""

    stack: _Stack
    workloads: dict[str, _Workload]


class Codec(msgspec.Struct):
    """One codec, with medians of its speeds over raw bytes."""

    bits_per_element: Positive
    encode_gb_per_s: dict[str, Positive]
    decode_gb_per_s: dict[str, Positive]


class _Rate(msgspec.Struct):
    gb_per_s: dict[str, Positive]


class Link(msgspec.Struct):
    """Goodput by way, over loopback and between two hosts."""

    loopback: dict[str, _Rate] = {}
    path: dict[str, _Rate] = {}


class UnfitError(ValueError):
    """A file that says nothing about this cluster, and why."""


def read(path: Path, measure: str) -> Envelope:
    """The result of ``measure`` at ``path``; :class:`OSError` or :class:`ValueError` if it cannot be read as one."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UnfitError(f"it is over {MAX_FILE_BYTES} bytes")
    envelope = msgspec.json.decode(path.read_bytes(), type=Envelope)
    if (envelope.schema, envelope.measure) != (SCHEMA, measure):
        raise UnfitError(f"it is {envelope.schema} of {envelope.measure}, not {SCHEMA} of {measure}")
    return envelope


def summary_of(envelope: Envelope, kind: type[S]) -> S:
    """The summary as ``kind``; :class:`msgspec.DecodeError` if it is none."""
    return msgspec.json.decode(envelope.summary, type=kind)


def require_model(measured: str, cluster: Cluster) -> None:
    """Raise :class:`UnfitError` unless the ``measured`` model is the cluster's."""
    if measured != cluster.pair.name:
        raise UnfitError(f"it is of the model {measured}, not of {cluster.pair.name}")


def require_host(envelope: Envelope, host: str, *, gpu: bool = False) -> None:
    """Raise :class:`UnfitError` if ``host`` is this machine and the result is of another; others cannot be compared."""
    if not is_local(host):
        return
    cpu = envelope.environment.cpu
    here = Cpu(cpu_model(), os.cpu_count() or 1)
    if cpu != here:
        raise UnfitError(
            f"it was measured on {cpu.logical_cores} cores of {cpu.model}, this host has {here.logical_cores} of "
            f"{here.model}"
        )
    if gpu and bool(envelope.environment.gpu) != Path("/proc/driver/nvidia/version").exists():
        raise UnfitError("it was measured with a GPU and there is none here, or the other way round")


def is_local(host: str) -> bool:
    """Whether the cluster file means this machine by ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cpu_model() -> str:
    """The processor here, as results write it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def kv_bytes_per_token(hf_dir: Path) -> int:
    """Bytes of one token's KV at 16 bits an element, by the model's ``config.json``; 0 if it does not tell."""
    try:
        config = json.loads((hf_dir / "config.json").read_text())
        text = config.get("text_config", config)
        heads: int = text["num_attention_heads"]
        head_dim: int = text.get("head_dim") or text["hidden_size"] // heads
        layers, kv_heads = int(text["num_hidden_layers"]), int(text.get("num_key_value_heads") or heads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
    return 2 * layers * kv_heads * head_dim * 2
