# SPDX-License-Identifier: Apache-2.0
"""A spike is told by a robust score that can be computed by hand, and by a loss of guessing."""

import math

import pytest

from megatron_keye.config import HealthConfig
from megatron_keye.config.health import FEWEST_STEPS
from megatron_keye.training.health.spikes import SpikeRule, robust_score

VOCAB = 20_000
"""Guessing has a loss of 9.9."""


def rule(**settings: float) -> SpikeRule:
    return SpikeRule(HealthConfig(**settings), VOCAB)  # type: ignore[arg-type]


def filled(values: list[float], **settings: float) -> SpikeRule:
    made = rule(**settings)
    for value in values:
        made.note({"loss": value, "gradient norm": 1.0})
    return made


def test_the_score_is_that_of_a_hand_computation() -> None:
    # Median 3; distances 2, 1, 0, 1, 97, of which the median is 1.
    before = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_score(10.0, before) == pytest.approx(7 / 1.4826)
    assert robust_score(1.0, before) == pytest.approx(-2 / 1.4826)


def test_like_values_do_not_make_noise_a_spike() -> None:
    assert robust_score(2.2, [2.0] * 9) == pytest.approx(0.2 / 0.04)
    assert math.isfinite(robust_score(1.0, [0.0] * 9))


def test_one_step_far_above_the_others_is_a_spike_and_one_below_is_not() -> None:
    made = filled([2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1])
    assert made.judge({"loss": 2.3, "gradient norm": 1.1}) == ""
    assert made.judge({"loss": 0.1, "gradient norm": 0.0}) == ""
    said = made.judge({"loss": 3.2, "gradient norm": 9.0})
    assert "loss 3.2 is 16.2 standard deviations above 2, the median of 8 steps" in said
    assert "gradient norm 9 is 400 standard deviations" in said


def test_the_first_steps_have_no_score() -> None:
    before = [2.0] * (FEWEST_STEPS - 1)
    assert filled(before).judge({"loss": 9.0, "gradient norm": 50.0}) == ""
    assert filled([*before, 2.0]).judge({"loss": 9.0, "gradient norm": 50.0}) != ""


def test_a_run_that_diverges_from_its_start_is_told_in_its_second_step() -> None:
    # A learning rate of 3, measured.
    losses = [11.9, 18.9, 27.2, 70.0, 95.2, 124.8]
    made = rule()
    said = []
    for loss in losses:
        said.append(bool(made.judge({"loss": loss, "gradient norm": 1.0})))
        made.note({"loss": loss, "gradient norm": 1.0})
    assert said == [False, True, True, True, True, True]


def test_a_model_that_begins_worse_than_a_guess_may_learn() -> None:
    assert filled([40.0, 38.0]).judge({"loss": 41.0, "gradient norm": 1.0}) == ""


def test_the_window_forgets_and_survives_a_resume() -> None:
    made = filled([float(n) for n in range(20)], window_steps=FEWEST_STEPS)
    other = rule(window_steps=FEWEST_STEPS)
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == made.state_dict()
    assert other.state_dict()["loss"] == [float(n) for n in range(12, 20)]
    other.load_state_dict({})
    assert other.state_dict()["loss"] == []


def test_without_a_least_score_nothing_is_a_spike() -> None:
    assert filled([2.0] * 20, spike_score=0.0).judge({"loss": 1e9, "gradient norm": 1e9}) == ""
