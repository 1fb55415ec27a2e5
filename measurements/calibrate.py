"""Devices of a simulation from measured times: of requests through a stack, or of ``prefill.json``, ``decode.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from measurements.profiles import Device, ModelShape, Setup, envelope_of
from measurements.roofline import Chunk, flops, step_seconds
from transfer.errors import ConfigError

# The shape of the default pair, which `measure prefill` and `measure decode` are about unless told otherwise.
MEASURED_MODEL = "smollm2-135m"
# As `measure decode` calls it.
OUR_WORKER = "isthmus"
_REWEIGHTINGS = 60
# Relative; smaller ones would let single points decide.
_NO_ERROR = 1e-4


class StepTime(NamedTuple):
    """A decode step over ``sequences`` sequences of ``context_tokens`` each took ``seconds``."""

    sequences: int
    context_tokens: int
    seconds: float


class FirstToken(NamedTuple):
    """A prompt of ``prompt_tokens``, alone, had its first token after ``seconds``."""

    prompt_tokens: int
    seconds: float


def prefill_set(device: Device, model: ModelShape, seen: Sequence[FirstToken]) -> Device:
    """``device`` with compute and time a request set by first tokens.

    A line through seconds over floating point operations (least absolute relative errors: a request that something
    else held up counts no more than any other): its slope is the compute that is reached, what is left at zero beyond
    a step's own overhead is ``request_ms``.
    """
    work = np.array([flops(model, [], [Chunk(0, each.prompt_tokens)]) for each in seen])
    seconds = np.array([each.seconds for each in seen])
    steps = np.array([-(-each.prompt_tokens // device.step_tokens) for each in seen])
    if len({each.prompt_tokens for each in seen}) < 2:
        raise ConfigError("prompts of two lengths at least are needed to tell a prefill's rate from its overhead")
    slope, at_zero = _line(work, seconds - steps * device.step_overhead_ms / 1e3, 1 / seconds)
    tflops = 1 / slope / 1e12
    peak = max(device.compute_tflops, tflops)
    return msgspec.structs.replace(
        device, compute_tflops=peak, compute_efficiency=tflops / peak, request_ms=max(at_zero, 0.0) * 1e3
    )


def decode_set(device: Device, model: ModelShape, steps: Sequence[StepTime]) -> Device:
    """``device`` with a step's overhead, alone and for each sequence, set by measured decode steps.

    A line through what the roofline leaves unexplained, over the number of sequences.
    """
    bare = msgspec.structs.replace(device, step_overhead_ms=0.0, sequence_ms=0.0)
    left = [each.seconds - step_seconds(bare, model, [each.context_tokens] * each.sequences, []) for each in steps]
    counts = np.array([each.sequences for each in steps], float)
    if len(set(counts)) < 2:
        return msgspec.structs.replace(device, step_overhead_ms=max(float(np.mean(left)), 0.0) * 1e3)
    slope, at_zero = (float(v) for v in np.polyfit(counts, left, 1, w=1 / np.array([each.seconds for each in steps])))
    return msgspec.structs.replace(device, step_overhead_ms=max(at_zero, 0.0) * 1e3, sequence_ms=max(slope, 0.0) * 1e3)


def engine_set(device: Device, model: ModelShape, seen: Sequence[FirstToken], steps: Sequence[StepTime]) -> Device:
    """``device`` set by both; each is fitted to what the other leaves, so compute is fitted twice."""
    return prefill_set(decode_set(prefill_set(device, model, seen), model, steps), model, seen)


def with_engines(setup: Setup, folder: Path) -> Setup:
    """``setup`` with engines as ``prefill.json`` and ``decode.json`` in ``folder`` found them, if they are there.

    Both measure the default pair; the caller knows whether ``setup`` is about it.
    """
    if (envelope := envelope_of(folder / "prefill.json", "prefill")) is not None:
        by_length = envelope["summary"]["tokens_per_s"]
        seen = [FirstToken(int(tokens), int(tokens) / rates["vLLM alone"]) for tokens, rates in by_length.items()]
        setup = msgspec.structs.replace(setup, gpu=prefill_set(setup.gpu, setup.model, seen))
    if (envelope := envelope_of(folder / "decode.json", "decode")) is not None:
        context = next(s["context_tokens"] for s in envelope["samples"] if s.get("what") == "memory")
        rates = envelope["summary"]["tokens_per_s"][OUR_WORKER]
        steps = [StepTime(int(count), context, int(count) / rate) for count, rate in rates.items()]
        setup = msgspec.structs.replace(setup, cpu=decode_set(setup.cpu, setup.model, steps))
    return setup


def _line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Slope, positive, and value at zero of the line with the least sum of absolute weighted errors.

    Found by least squares that are weighted again and again (Schlossmacher, "An iterative technique for absolute
    deviations curve fitting", 1973).
    """
    errors = np.ones_like(y)
    for _ in range(_REWEIGHTINGS):
        # polyfit squares its weights.
        slope, at_zero = (float(each) for each in np.polyfit(x, y, 1, w=weights / np.sqrt(errors)))
        errors = np.maximum(np.abs(weights * (y - slope * x - at_zero)), _NO_ERROR)
    return max(slope, 1e-18), at_zero
