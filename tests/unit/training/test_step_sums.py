# SPDX-License-Identifier: Apache-2.0
"""A run's figures come from sums over its steps."""

import math

import pytest

from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.step_sums import StepSums
from tests.support.metrics import step_metrics


def summed(*steps: StepMetrics) -> StepSums:
    """Return the sums over steps."""
    sums = StepSums()
    for metrics in steps:
        sums.add(metrics)
    return sums


def test_rates_weigh_steps_by_their_time_and_leave_out_the_first() -> None:
    first = step_metrics(step_seconds=100.0, mfu=0.0, peak_memory_gib=80.0)
    short = step_metrics(tokens=10, step_seconds=1.0, tflops_per_device=4.0, mfu=0.4)
    long = step_metrics(tokens=10, step_seconds=3.0, tflops_per_device=0.0, mfu=0.0, loss=0.5)
    measured = summed(first, short, long).figures()
    expected = {
        "tokens_per_second": 5.0,
        "tflops_per_device": 1.0,
        "mfu": 0.1,
        "step_seconds": 2.0,
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected)
    assert measured["peak_memory_gib"] == 80.0 and measured["last_loss"] == 0.5
    assert summed(first).figures()["step_seconds"] == 100.0, "a single step is all there is"
    assert "mfu" not in summed(step_metrics(mfu=math.nan)).figures()
