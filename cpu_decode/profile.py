"""A machine's best settings, as ``isthmus measure decode --tune`` found them, in place of the cluster file's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from cpu_decode.state import is_quantized
from transfer.config import CellLayout, Decode
from transfer.errors import ConfigError

SCHEMA = "isthmus.profile/2"


class Tuned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``[decode]`` that a profile sets; the last two not where the cluster file has cells quantized."""

    threads: Annotated[int, msgspec.Meta(ge=1)]
    batch_threads: Annotated[int, msgspec.Meta(ge=1)]
    spin_count: Annotated[int, msgspec.Meta(ge=0)]
    huge_pages: bool
    mmap: bool
    cell_layout: CellLayout = "unified"
    flash_attention: bool = True
    cell_type: Literal["f16", "bf16"] = "f16"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The file: what was found, and what else was seen on the way, which a worker does not look at.

    ``row_ns`` is how long batches take with those settings, by their number of rows: what guessing costs.
    """

    decode: Tuned
    row_ns: dict[int, float] = {}
    gguf: str
    host: dict[str, Any]
    seen: dict[str, float]
    schema: str = SCHEMA


def apply(decode: Decode) -> Decode:
    """``decode`` with the settings of its profile, if it names one; :class:`ConfigError` if that cannot be read."""
    profile = _read(decode)
    if profile is None:
        return decode
    settings = msgspec.structs.asdict(profile.decode)
    if is_quantized(decode.cell_type):
        # Taken for its size, which is not for a profile to double, and it needs flash attention.
        del settings["cell_type"], settings["flash_attention"]
    return msgspec.structs.replace(decode, **settings)


def row_ns(decode: Decode) -> dict[int, float]:
    """How long batches take by their number of rows, as the profile of ``decode`` says; empty if that says nothing."""
    profile = _read(decode)
    return profile.row_ns if profile else {}


def _read(decode: Decode) -> Profile | None:
    if not decode.profile:
        return None
    path = Path(decode.profile)
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror} - at [decode] profile") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error} - at [decode] profile") from None
    if profile.schema != SCHEMA:
        raise ConfigError(f"{path} has schema {profile.schema!r}, this worker reads {SCHEMA!r}; tune again")
    return profile


def write(path: Path, profile: Profile) -> None:
    """Write a profile; :class:`ConfigError` if ``path`` cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
