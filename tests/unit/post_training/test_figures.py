# SPDX-License-Identifier: Apache-2.0
"""The updates of a step are told as one, and sick figures end a run in a sentence."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.config import PostTrainingConfig
from megatron_keye.errors import UserError
from megatron_keye.post_training.figures import as_one_step, check_figures
from megatron_keye.post_training.ratios import Ratios, passes_gate
from megatron_keye.post_training.rollouts import Rollout
from tests.support.metrics import step_metrics
from tests.support.tiny import tiny_run

SETTINGS = PostTrainingConfig(kind="gspo", clip_low=0.1, clip_high=0.2)
GOOD = {"share_not_scored": 0.0, "share_not_finite": 0.0}


def test_updates_add_up() -> None:
    one = replace(step_metrics(), loss=1.0, tokens=10, step_seconds=1.0, gradient_norm=3.0)
    two = replace(one, loss=3.0, tokens=30, step_seconds=3.0, gradient_norm=2.0, was_applied=False)
    both = as_one_step([one, two])
    assert (both.loss, both.tokens, both.step_seconds) == (2.0, 40, 4.0)
    assert (both.tokens_per_second, both.gradient_norm) == (10.0, 3.0)
    assert both.was_applied == one.was_applied


def test_rewards_that_fail_too_often_end_the_run() -> None:
    run, rollout = tiny_run(), Rollout(failures=["question '7', answer 2: took too long"])
    check_figures(GOOD, rollout, run)
    with pytest.raises(
        UserError, match=r"max_failed_rewards: 10\.0% .* at most 5\.0%; .*too long"
    ):
        check_figures(GOOD | {"share_not_scored": 0.1}, rollout, run)
    with pytest.raises(UserError, match=r"2\.0% of the ratios of a step are not finite"):
        check_figures(GOOD | {"share_not_finite": 0.02}, rollout, run)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [(0.3, 1.0, 1.0), (0.3, -1.0, 0.0), (-0.3, -1.0, 1.0), (-0.3, 1.0, 0.0), (0.05, 1.0, 0.0)],
)
def test_an_answer_is_clipped_where_it_would_go_too_far(
    log_ratio: float, advantage: float, clipped: float
) -> None:
    found = Ratios.of(np.array([log_ratio - 0.2, log_ratio + 0.2]), advantage, SETTINGS)
    assert found.clipped == clipped and found.mean == pytest.approx(np.exp(log_ratio))
    assert Ratios.of(np.array([np.nan, 0.0]), advantage, SETTINGS).not_finite == 1


def test_the_gate_is_a_geometric_mean() -> None:
    assert passes_gate(np.array([0.1, -0.1]), SETTINGS)
    assert not passes_gate(np.array([0.003, 0.003]), SETTINGS)
    assert not passes_gate(np.array([np.nan]), SETTINGS)
