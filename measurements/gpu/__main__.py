"""``python -m measurements.gpu``: all parts, or some, into one result file; exits 1 if an element is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from isthmus.output_file import OutputFile
from isthmus.pair import model_name
from measurements import result
from measurements.gpu import churn, gather, served
from transfer.config import Pair
from transfer.errors import ConfigError, IsthmusError

PARTS = ("equal", "speed", "churn", "serve")
SPEED_TOKENS = (512, 2048)
PROMPT_TOKENS = 512


@click.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this one. Repeatable.")
@click.option("--hf-dir", type=click.Path(path_type=Path), help="A model, for `serve` and for its real KV.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The same model for llama.cpp, for `serve`.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--requests", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Prompts of `churn`.")
@click.option("--layers", type=click.IntRange(1, 100), default=gather.SPEED_LAYERS, show_default=True, help="`speed`.")
@click.option("--json", type=OutputFile(), required=True, help="Where the result goes.")
def main(
    device: str,
    parts: tuple[str, ...],
    hf_dir: Path | None,
    gguf: Path | None,
    rounds: int,
    requests: int,
    layers: int,
    json: Path,
) -> None:
    """Check and time the prefill node's export on this machine's GPU, or try the same on its CPU."""
    try:
        _require(device, parts, hf_dir, gguf)
        environment = result.environment() | {"device": _device_name(device)}
        samples: list[dict[str, Any]] = []
        for part in parts or PARTS:
            click.echo(f"{part} on {device}", err=True)
            samples += _run(part, device, hf_dir, gguf, rounds, requests, layers)
            # What is known is kept if a later part fails.
            result.write(json, "gpu", environment, samples, summarize(samples), ("python", "-m", "measurements.gpu"))
    except IsthmusError as error:
        click.echo(f"measurements.gpu: {error}", err=True)
        sys.exit(2)
    summary = summarize(samples)
    click.echo(f"{summary}")
    sys.exit(1 if summary["wrong_elements"] else 0)


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What each part found; ``wrong_elements`` of all."""
    gathered = gather.summarize(samples)
    churned = [sample for sample in samples if sample["part"] == "churn"]
    names = ("exported", "preempted", "aborted", "deferred", "unfinished", "wrong_elements")
    churn_counts = {name: sum(sample[name] for sample in churned) for name in names}
    wrong = gathered["wrong_elements"] + churn_counts["wrong_elements"] + churn_counts["unfinished"]
    return gathered | {"churn": churn_counts, "serve": served.summarize(samples), "wrong_elements": wrong}


def _require(device: str, parts: tuple[str, ...], hf_dir: Path | None, gguf: Path | None) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --device cpu tries everything without one")
    if ("serve" in parts or not parts) and (hf_dir is None or gguf is None):
        raise ConfigError("`serve` needs --hf-dir and --gguf; or name the other parts with --part")


def _run(
    part: str, device: str, hf_dir: Path | None, gguf: Path | None, rounds: int, requests: int, layers: int
) -> Iterator[dict[str, Any]]:
    match part:
        case "equal":
            yield from gather.check_random(device)
            if hf_dir is not None:
                yield from _check_real(device, hf_dir)
        case "speed":
            yield from gather.speed(device, SPEED_TOKENS, rounds, layers)
        case "churn":
            yield from churn.run(device, requests)
        case _:
            pair = Pair(name=model_name(Path(str(gguf))), hf_dir=str(hf_dir), gguf=str(gguf))
            yield from served.serve(pair, device, rounds)


def _check_real(device: str, hf_dir: Path) -> Iterator[dict[str, Any]]:
    from transformers import AutoTokenizer

    from gpu_prefill.geometry import read_geometry, read_rope_order
    from isthmus.demo import question
    from measurements.reference import Reference

    geometry, order = read_geometry(hf_dir), read_rope_order(hf_dir)
    tokens = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True).encode(question())[:PROMPT_TOKENS]
    planes = Reference(hf_dir, "bfloat16").planes(tokens, geometry, order, order)
    shape = gather.Shape(geometry.num_kv_heads, geometry.head_dim_k, geometry.rope_dims, 16)
    yield from gather.check_real(device, planes, shape)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
