"""What a simulation is told: devices, link, model and codecs, from shipped profiles, files, results and flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from measurements.result import SCHEMA
from transfer.errors import ConfigError

HARDWARE = Path(__file__).parent / "hardware"

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: unknown keys are refused by name."""

    name: str


class Device(Profile, frozen=True, kw_only=True):
    """A node: ``nodes`` equal engines (sockets) that each hold the whole model.

    Peaks of one engine and the shares of them that it reaches: ``compute`` in prefill, ``memory`` in decoding.
    ``memory_gib`` is for weights and KV. Every step costs ``step_overhead_ms`` more. ``step_tokens`` is vLLM's
    ``max_num_batched_tokens`` or our ``prefill_batch_tokens``. Prefixes are kept in blocks of ``block_tokens``. KV
    from elsewhere is written at ``inject_gb_per_s``. Measured devices may also have ``sequence_ms`` for every
    sequence that a step decodes, and ``request_ms`` for every request before its prefill.
    """

    engine: Literal["vllm", "llama.cpp"]
    nodes: Count = 1
    compute_tflops: Positive
    compute_efficiency: Share
    memory_gb_per_s: Positive
    memory_efficiency: Share
    memory_gib: Positive
    step_overhead_ms: Annotated[float, msgspec.Meta(ge=0)]
    step_tokens: Count
    max_sequences: Count
    block_tokens: Count = 16
    inject_gb_per_s: Positive = 10.0
    sequence_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    request_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class LinkSpeed(Profile, frozen=True, kw_only=True):
    """The wire: ``efficiency`` is goodput over line rate; ``handoff_ms`` are control messages around one transfer."""

    gbit_per_s: Positive
    efficiency: Share
    handoff_ms: Annotated[float, msgspec.Meta(ge=0)]


class ModelShape(Profile, frozen=True, kw_only=True):
    """A dense transformer. ``gpu_bits_per_weight`` is what vLLM holds, ``cpu_bits_per_weight`` the GGUF."""

    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    layer_params: Count
    output_params: Count
    gpu_bits_per_weight: Positive
    cpu_bits_per_weight: Positive


class CodecCost(Profile, frozen=True, kw_only=True):
    """A codec's size, and its speed on one core of either side in GB/s of 16-bit elements."""

    bits_per_element: Positive
    encode_gb_per_s: Positive
    decode_gb_per_s: Positive


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. Requests that come together reach the engines ``arrival_ms`` apart: the proxy takes one at a time.

    With ``shared_cores`` both devices are the same cores, and engines that compute at once get half.
    """

    gpu: Device
    cpu: Device
    link: LinkSpeed
    model: ModelShape
    codecs: tuple[CodecCost, ...]
    shared_cores: bool = False
    arrival_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0


P = TypeVar("P", bound=Profile)


def read(name: str, kind: type[P]) -> P:
    """The shipped profile ``name``, or the one in the TOML or JSON file of that path.

    Raises :class:`ConfigError` naming the shipped ones, or the file and the key that is wrong.
    """
    path = HARDWARE / f"{name}.toml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(each.stem for each in HARDWARE.glob("*.toml") if _is(each, kind)))
        raise ConfigError(f"{name!r} is neither a file nor a shipped profile; there are {shipped}")
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        return decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def codecs(names: Sequence[str]) -> tuple[CodecCost, ...]:
    """The shipped costs of the codecs in ``names``; :class:`ConfigError` naming the ones there are."""
    table = msgspec.toml.decode((HARDWARE / "codecs.toml").read_bytes(), type=dict[str, list[CodecCost]])["codecs"]
    known = {codec.name: codec for codec in table}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"no costs of codec {unknown[0]!r} are known; there are {', '.join(known)} - at --codec")
    return tuple(known[name] for name in names)


def changed(setup: Setup, assignments: Sequence[str]) -> Setup:
    """``setup`` with numbers such as ``gpu.memory_gb_per_s=600`` in place of its own.

    Raises :class:`ConfigError` naming the assignment that says nothing of the setup, and what it could say.
    """
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        part, _, field = key.partition(".")
        profile = getattr(setup, part, None)
        if not isinstance(profile, Profile):
            raise ConfigError(f"--set {assignment}: {part!r} is none of gpu, cpu, link, model")
        built = msgspec.to_builtins(profile)
        if field not in built:
            raise ConfigError(f"--set {assignment}: {part} has no {field!r}; it has {', '.join(built)}")
        try:
            made = msgspec.convert(built | {field: value}, type(profile), strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--set {assignment}: {error}") from None
        setup = msgspec.structs.replace(setup, **{part: made})
    return setup


def scaled(setup: Setup, key: str, factor: float) -> Setup:
    """``setup`` with one number, such as ``link.gbit_per_s``, times ``factor``."""
    part, _, field = key.partition(".")
    profile = getattr(setup, part)
    number = getattr(profile, field) * factor
    return msgspec.structs.replace(setup, **{part: msgspec.structs.replace(profile, **{field: number})})


def with_results(setup: Setup, folder: Path) -> Setup:
    """``setup`` with what ``measure`` found on this machine: codec sizes and speeds, and the link's efficiency.

    Reads ``codec.json`` and ``link.json``, as far as they are in ``folder``; :class:`ConfigError` if neither is.
    """
    files = {name: envelope_of(folder / f"{name}.json", name) for name in ("codec", "link")}
    found = {name: envelope["summary"] for name, envelope in files.items() if envelope is not None}
    if not found:
        raise ConfigError(f"{folder} has neither codec.json nor link.json; see `isthmus measure codec --json`")
    if codec := found.get("codec"):
        setup = msgspec.structs.replace(setup, codecs=tuple(_measured(each, codec) for each in setup.codecs))
    if efficiency := found.get("link", {}).get("shaped_10g_raw_vs_iperf3"):
        setup = changed(setup, [f"link.efficiency={min(float(efficiency), 1.0)}"])
    return setup


def _measured(codec: CodecCost, summary: dict[str, Any]) -> CodecCost:
    row = summary.get(codec.name)
    if row is None:
        return codec
    return CodecCost(
        name=codec.name,
        bits_per_element=row["bits_per_element"],
        encode_gb_per_s=row["encode_gb_per_s"]["median"],
        decode_gb_per_s=row["decode_gb_per_s"]["median"],
    )


def envelope_of(path: Path, measure: str) -> dict[str, Any] | None:
    """A result file, None if there is none; :class:`ConfigError` if it is not of that measurement."""
    if not path.exists():
        return None
    try:
        envelope: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(envelope, dict) or (envelope.get("schema"), envelope.get("measure")) != (SCHEMA, measure):
        raise ConfigError(f"{path} is not a result of `isthmus measure {measure}`")
    return envelope


def _is(path: Path, kind: type[Profile]) -> bool:
    try:
        msgspec.toml.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError:
        return False
    return True
