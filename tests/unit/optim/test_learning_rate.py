"""The learning rate warms up linearly and decays by a cosine."""

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
