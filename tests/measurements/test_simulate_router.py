"""The proxy's own policy in the simulation."""

from __future__ import annotations

import pytest

from measurements.profiles import Device, LinkSpeed, ModelShape, Setup, codecs, read
from measurements.simulate import simulate
from measurements.workloads import QUICK_WORKLOADS


@pytest.mark.parametrize("shared_cores", [True, False])
def test_auto_is_near_the_best_way_where_engines_share_cores_and_where_they_do_not(shared_cores):
    setup = Setup(
        gpu=read("two-core-vllm", Device),
        cpu=read("two-core-llama", Device),
        link=read("loopback", LinkSpeed),
        model=read("smollm2-135m", ModelShape),
        codecs=codecs(("raw",)),
        shared_cores=shared_cores,
    )
    # Of those that come at once with a prefix in common, none knows that it will be there.
    for workload in (each for each in QUICK_WORKLOADS if not each.shared_tokens):
        for concurrency in (1, 2, 4, 8, 16):
            rates = {
                way: sum(each.output_tokens for each in run.answers) / sum(each.e2e_s for each in run.answers)
                for way in ("gpu", "cpu", "split", "auto")
                if (run := simulate(setup, way, setup.codecs[0], workload, concurrency, 2))
            }
            auto = rates.pop("auto")
            assert auto >= 0.9 * max(rates.values()), (workload.name, concurrency, rates, auto)
