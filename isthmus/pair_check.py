"""Whether a Hugging Face directory and a GGUF are the same model, as far as a handoff between them can notice."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfer.errors import ConfigError, GeometryError, IsthmusError
from transfer.geometry import require_same

# Whitespace, digits, capitals, accents, scripts, emoji made of several code points, and text that looks like markup.
SAMPLES = (
    "The quick brown fox, at 09:41, paid $1,234.50.",
    "  two spaces,\ttab\n\n\nthree newlines  ",
    "don't can't I'LL we've",
    "Größe naïve Ångström — “quoted”",
    "日本語のテキスト и русский текст",
    "👩‍🚀🇳🇴 e\u0301",
    "def f(x):\n    return x**2  # <b>bold</b>",
)


def check(hf_dir: Path, gguf: Path) -> Iterator[str]:
    """Compare the two, yielding one line for every comparison that holds.

    Raises :class:`ConfigError` naming the first difference, or the file that cannot be read.
    """
    yield _check_geometry(hf_dir, gguf)
    yield _check_weight_files(hf_dir)
    tokenizer = _load_tokenizer(hf_dir)
    metadata = _read_metadata(gguf)
    yield _check_vocabulary(tokenizer, metadata)
    yield _check_tokenization(tokenizer, gguf)
    yield _check_chat_template(tokenizer, metadata)


def _check_geometry(hf_dir: Path, gguf: Path) -> str:
    from cpu_decode.geometry import read_geometry as read_gguf
    from gpu_prefill.geometry import read_geometry as read_hf

    try:
        ours, theirs = read_hf(hf_dir), read_gguf(gguf)
        require_same(ours, theirs)
    except GeometryError as error:
        raise ConfigError(f"{error} (here is {hf_dir}, there is {gguf})") from None
    except IsthmusError as error:
        raise ConfigError(str(error)) from error
    return f"geometry: {ours.num_layers} layers, {ours.num_kv_heads} KV heads of {ours.head_dim_k}, the same weights"


def _check_weight_files(hf_dir: Path) -> str:
    """Every weight file that the checkpoint lists is there and as long as its head says."""
    from safetensors import SafetensorError, safe_open

    index = hf_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    num_tensors = 0
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            with safe_open(hf_dir / name, framework="numpy") as tensors:
                num_tensors += len(tensors.keys())
    except SafetensorError as error:
        raise ConfigError(f"{hf_dir / name} is cut short or damaged: {error}") from None
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{hf_dir} lacks weights: {error}") from None
    return f"weight files: {len(names)}, {num_tensors} tensors"


def _load_tokenizer(hf_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{hf_dir} has no readable tokenizer: {str(error).strip().splitlines()[0]}") from error


def _read_metadata(gguf: Path) -> dict[str, Any]:
    """The GGUF's tokens, token types and chat template, by metadata key."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ConfigError(f"cannot read {gguf}: {error}") from error
    wanted = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template")
    return {key: fields[key].contents() for key in wanted if key in fields}


def _check_vocabulary(tokenizer: Any, metadata: dict[str, Any]) -> str:
    from gguf import TokenType

    pieces: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(pieces))
    if len(tokenizer) > len(pieces):
        raise ConfigError(f"vocabulary differs: {len(tokenizer)} tokens in the HF directory, {len(pieces)} in the GGUF")
    for token_id, (hf_piece, gguf_piece) in enumerate(
        zip(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), pieces, strict=False)
    ):
        # Conversion fills holes in the vocabulary with unused pieces of its own naming.
        if hf_piece != gguf_piece and types[token_id] != TokenType.UNUSED:
            raise ConfigError(f"token {token_id} differs: {hf_piece!r} in the HF directory, {gguf_piece!r} in the GGUF")
    return f"vocabulary: {len(tokenizer)} tokens"


def _check_tokenization(tokenizer: Any, gguf: Path) -> str:
    try:
        from llama_cpp import Llama
    except ImportError:
        return "tokenization: not compared, llama-cpp-python is not installed here"

    try:
        model = Llama(str(gguf), vocab_only=True, verbose=False)
    except ValueError as error:
        raise ConfigError(f"llama.cpp cannot read {gguf}: {error}") from error
    try:
        for sample in SAMPLES:
            hf_ids = tokenizer.encode(sample, add_special_tokens=False)
            gguf_ids = model.tokenize(sample.encode(), add_bos=False, special=True)
            if hf_ids != gguf_ids:
                raise ConfigError(
                    f"tokenization of {sample!r} differs: {hf_ids} in the HF directory, {gguf_ids} in the GGUF"
                )
    finally:
        model.close()
    return f"tokenization: {len(SAMPLES)} samples"


def _check_chat_template(tokenizer: Any, metadata: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the HF directory has no chat template; add chat_template.jinja, or chat requests cannot work"
        )
    in_gguf = metadata.get("tokenizer.chat_template")
    if in_gguf is None:
        return "chat template: present (the GGUF has none)"
    # The proxy renders with the HF directory's, so another one in the GGUF is worth saying but breaks nothing.
    return f"chat template: present, {'the same' if in_gguf == tokenizer.chat_template else 'not the one'} in the GGUF"
