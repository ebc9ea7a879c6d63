# SPDX-License-Identifier: Apache-2.0
"""The learning rate warms up linearly, then follows the schedule of the run."""

import pytest

from megatron_keye.config import OptimizerConfig
from megatron_keye.optim.learning_rate import learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rates = [learning_rate(step, 20, OPTIMIZER) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_decay_is_a_cosine_down_to_the_minimum() -> None:
    assert learning_rate(12, 20, OPTIMIZER) == pytest.approx(0.55)
    assert learning_rate(20, 20, OPTIMIZER) == pytest.approx(0.1)
    assert learning_rate(99, 20, OPTIMIZER) == pytest.approx(0.1)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    flat = OptimizerConfig(learning_rate=0.5, min_learning_rate=0.5)
    assert learning_rate(0, 1, flat) == 0.5


def test_a_linear_decay_is_even() -> None:
    linear = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2, schedule="linear"
    )
    rates = [learning_rate(step, 6, linear) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 5, constant) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


def stable(warmup_steps: int, decay_steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1.0,
        min_learning_rate=0.2,
        schedule="warmup_stable_decay",
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
    )


def test_a_stable_rate_decays_in_the_last_steps() -> None:
    rates = [learning_rate(step, 8, stable(2, 4)) for step in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_decay_longer_than_the_run_begins_after_the_warm_up() -> None:
    rates = [learning_rate(step, 6, stable(2, 40)) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
