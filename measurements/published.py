"""Published measurements of split serving, and what the simulation makes of the same hardware and requests."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from measurements.profiles import Device, LinkSpeed, ModelShape, Setup, codecs, read
from measurements.simulate import Answer, Architecture, Run, simulate
from measurements.workloads import Workload
from transfer.errors import ConfigError


class Point(NamedTuple):
    """One number from elsewhere beside ours. ``counts`` if it tests the simulation.

    It does not where a profile was made to fit the number, or where what was measured is not what the simulation
    models; ``note`` says which.
    """

    source: str
    what: str
    unit: str
    published: float
    predicted: float
    counts: bool = True
    note: str = ""

    @property
    def error(self) -> float:
        """Relative to what was published."""
        return self.predicted / self.published - 1


EXO = "EXO Labs, 8,192-token prompt over 10 GbE"
TWO_SPARKS = "two DGX Spark with vLLM, 8 requests at once"
TWO_CORES = "Isthmus on two cores (README)"

_FIT = "a profile is set by it"
_SLOW_HANDOFF = "one request alone took 2.05 s longer split than on one node; moving 1 MB of KV takes no such time"
_SERIAL = (
    "not reproduced: 30.2 s for all and 18.6 s on average are what four requests take one after another on each"
    " replica; whatever held them up is not replication"
)
_HYPOTHESIS = "tests that explanation, not the simulation"


def points() -> Iterator[Point]:
    """Every number, source by source."""
    yield from _exo()
    yield from _two_sparks()
    yield from _two_cores()


def summary() -> dict[str, Any]:
    """Median and largest absolute error over the numbers that count, and how many those are."""
    errors = [abs(point.error) for point in points() if point.counts]
    return {
        "validation_error_median": statistics.median(errors),
        "validation_error_largest": max(errors),
        "validation_points": len(errors),
    }


def _setup(gpu: str, cpu: str, link: str, model: str) -> Setup:
    return Setup(
        gpu=read(gpu, Device),
        cpu=read(cpu, Device),
        link=read(link, LinkSpeed),
        model=read(model, ModelShape),
        codecs=codecs(["raw"]),
    )


def _run(setup: Setup, architecture: Architecture, workload: Workload, concurrency: int = 1) -> Run:
    run = simulate(setup, architecture, setup.codecs[0], workload, concurrency)
    if run is None:
        raise ConfigError(f"the shipped profiles have no room for {workload.name} by {architecture}")
    return run


def _exo() -> Iterator[Point]:
    """blog.exolabs.net/nvidia-dgx-spark, 15 October 2025: a table of prefill, generation and total.

    The length of the answer is not in the table; 32 tokens are assumed, 43 are the most that the M3 Ultra's bandwidth
    allows in 0.85 s. As both machines alone are fitted, only the sum that overlap leaves over depends on it.
    """
    setup = _setup("dgx-spark", "m3-ultra", "10gbe", "llama-3.1-8b-16bit")
    # Their raw KV goes from GPU to GPU: no codec of ours is in the way.
    fast = msgspec.structs.replace(setup.codecs[0], encode_gb_per_s=100.0, decode_gb_per_s=100.0)
    setup = msgspec.structs.replace(setup, codecs=(fast,))
    workload = Workload("EXO", 8192, 33, ttft_slo_s=10, tpot_slo_s=1, spread=0)
    spark, mac, both = (_run(setup, each, workload).answers[0] for each in ("gpu", "cpu", "split"))
    yield Point(EXO, "DGX Spark alone, prefill", "s", 1.47, spark.ttft_s, False, _FIT)
    yield Point(EXO, "DGX Spark alone, decode", "s", 2.87, spark.e2e_s - spark.ttft_s, False, _FIT)
    yield Point(EXO, "M3 Ultra alone, prefill", "s", 5.57, mac.ttft_s, False, _FIT)
    yield Point(EXO, "M3 Ultra alone, decode", "s", 0.85, mac.e2e_s - mac.ttft_s, False, _FIT)
    yield Point(EXO, "split, prefill", "s", 1.47, both.ttft_s)
    yield Point(EXO, "split, decode", "s", 0.85, both.e2e_s - both.ttft_s)
    yield Point(EXO, "split, total", "s", 2.32, both.e2e_s)
    yield Point(EXO, "split over M3 Ultra alone", "x", 2.8, mac.e2e_s / both.e2e_s)
    yield Point(EXO, "split over DGX Spark alone", "x", 4.34 / 2.32, spark.e2e_s / both.e2e_s)


def _two_sparks() -> Iterator[Point]:
    """github.com/elizabetht/spark, notebooks/02_disaggregated-serving/vllm-native: eight prompts of some eight tokens.

    100 tokens are generated for each; throughput is all 800 over the time until the last one is there.
    """
    setup = _setup("dgx-spark-vllm", "dgx-spark-vllm", "100gbe", "llama-3.1-8b-16bit")
    one = Workload("one question", 8, 100, ttft_slo_s=10, tpot_slo_s=1, spread=0)
    eight = one._replace(name="eight questions", together=True)
    # A worker of the published run is vLLM again, which reserves nothing ahead; eight short requests fit either way.
    yield Point(TWO_SPARKS, "single node, 1 request", "tok/s", 14.55, _throughput(_run(setup, "gpu", one)), False, _FIT)
    yield Point(TWO_SPARKS, "single node", "tok/s", 122.45, _throughput(_run(setup, "gpu", eight, 8)))
    split = _throughput(_run(setup, "split", eight, 8))
    yield Point(TWO_SPARKS, "split", "tok/s", 101.9, split, note=_SLOW_HANDOFF)
    batched = _throughput(_run(setup, "replicated", eight, 8))
    yield Point(TWO_SPARKS, "replicated", "tok/s", 26.48, batched, False, _SERIAL)
    one_by_one = msgspec.structs.replace(
        setup,
        gpu=msgspec.structs.replace(setup.gpu, max_sequences=1),
        cpu=msgspec.structs.replace(setup.cpu, max_sequences=1),
    )
    serial = _run(one_by_one, "replicated", eight, 8)
    served = _throughput(serial)
    yield Point(TWO_SPARKS, "replicated, one by one on each", "tok/s", 26.48, served, False, _HYPOTHESIS)
    latency_s = statistics.fmean(answer.e2e_s for answer in serial.answers)
    yield Point(TWO_SPARKS, "mean latency of that", "s", 18.63, latency_s, False, _HYPOTHESIS)


def _throughput(run: Run) -> float:
    """Tokens/s of rounds whose requests begin together, each of which lasts as long as its longest one."""
    rounds: dict[int, list[Answer]] = {}
    seen: dict[int, int] = {}
    for answer in run.answers:
        turn = seen[answer.client] = seen.get(answer.client, -1) + 1
        rounds.setdefault(turn, []).append(answer)
    spans_s = [max(answer.e2e_s for answer in answers) for answers in rounds.values()]
    return sum(answer.output_tokens for answer in run.answers) / sum(spans_s)


def _two_cores() -> Iterator[Point]:
    """The README's table of `make demo COMPARE=1`: three processes and the client on the same two cores."""
    setup = _setup("two-core-vllm", "two-core-llama", "loopback", "smollm2-135m")
    workload = Workload("demo", 984, 64, ttft_slo_s=10, tpot_slo_s=1, spread=0)
    gpu, cpu, split = (_run(setup, each, workload).answers[0] for each in ("gpu", "cpu", "split"))
    yield Point(TWO_CORES, "gpu, first token", "s", 1.02, gpu.ttft_s, False, _FIT)
    yield Point(TWO_CORES, "gpu, each other token", "ms", 46.7, gpu.tpot_s * 1e3, False, _FIT)
    yield Point(TWO_CORES, "cpu, first token", "s", 4.08, cpu.ttft_s, False, _FIT)
    yield Point(TWO_CORES, "cpu, each other token", "ms", 14.5, cpu.tpot_s * 1e3, False, _FIT)
    yield Point(TWO_CORES, "split, first token", "s", 1.14, split.ttft_s)
    yield Point(TWO_CORES, "split, each other token", "ms", 14.7, split.tpot_s * 1e3)
    yield Point(TWO_CORES, "split, end to end", "s", 2.18, split.e2e_s)
