# SPDX-License-Identifier: Apache-2.0
"""Advantages are relative to the group alone, and what was not scored is in no mean."""

import numpy as np
import pytest

from megatron_keye.post_training.groups import advantages, has_variance

NAN = float("nan")


def test_advantages_have_mean_zero_and_the_population_s_deviation() -> None:
    found = advantages(np.array([0.0, 0.5, 1.0, 0.25]))
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1, rel=1e-5), "ddof 0"


def test_an_answer_that_was_not_scored_changes_no_other() -> None:
    with_gap = advantages(np.array([1.0, NAN, 0.0, 0.0]))
    assert np.isnan(with_gap[1])
    assert with_gap[[0, 2, 3]].tolist() == advantages(np.array([1.0, 0.0, 0.0])).tolist()
    assert np.isnan(advantages(np.array([NAN, NAN]))).all()


def test_equal_rewards_are_worth_nothing_and_teach_nothing() -> None:
    equal = np.array([0.3, 0.1 + 0.2, 0.3])
    assert np.abs(advantages(equal)).max() < 1e-9
    assert not has_variance(equal)
    assert not has_variance(np.array([1.0, NAN])) and not has_variance(np.array([NAN]))
    assert has_variance(np.array([0.3, 0.31, NAN]))
