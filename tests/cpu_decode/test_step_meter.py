from __future__ import annotations

import pytest

from cpu_decode.step_meter import Pace, Step, StepMeter

S, MS = 1_000_000_000, 1_000_000


def test_means_are_over_plain_steps_of_the_last_second_and_the_rate_over_all() -> None:
    meter = StepMeter()
    assert meter.pace(0) == Pace()
    meter.add(Step(1 * S, 90 * MS, 9, 9000, 9, plain=True))
    meter.add(Step(2 * S + 1, 10 * MS, 2, 200, 2, plain=True))
    meter.add(Step(2 * S + 20 * MS, 20 * MS, 4, 400, 4, plain=True))
    meter.add(Step(2 * S + 99 * MS, 79 * MS, 4, 400, 10, plain=False))
    pace = meter.pace(2 * S + 100 * MS)
    assert pace.tokens_per_s == pytest.approx(16)
    assert pace == Pace(pace.tokens_per_s, 15 * MS, 3.0, 300.0)


def test_an_idle_worker_remembers_how_long_its_steps_took() -> None:
    meter = StepMeter()
    meter.add(Step(1 * S, 10 * MS, 2, 200, 2, plain=True))
    meter.add(Step(1 * S, 50 * MS, 2, 200, 2, plain=False))
    assert meter.pace(9 * S) == Pace(0.0, 10 * MS, 2.0, 200.0)
