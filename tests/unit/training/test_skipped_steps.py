"""A run whose steps are all skipped ends with the likely causes, not with success."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_keye.errors import UserError
from megatron_keye.training.skipped_steps import SkippedSteps
from tests.support.tiny import tiny_run


def metrics(*, was_applied: bool) -> Any:
    return SimpleNamespace(was_applied=was_applied, loss=float("nan"), indexer_kl=0.5)


def watch(most: int) -> SkippedSteps:
    return SkippedSteps(tiny_run(training={"max_skipped_steps": most}))


def test_only_steps_in_a_row_count() -> None:
    skipped = watch(3)
    for step, was_applied in enumerate((False, False, True, False, False), start=1):
        skipped.note(step, metrics(was_applied=was_applied))
    with pytest.raises(UserError, match="3 steps in a row.* step 6, .*loss nan.*learning_rate"):
        skipped.note(6, metrics(was_applied=False))


def test_a_run_without_an_update_does_not_end_well() -> None:
    skipped = watch(10)
    skipped.check_learned(1, metrics(was_applied=False))
    with pytest.raises(UserError, match="no step changed a weight.*indexer_loss_weight=1.0"):
        skipped.check_learned(0, metrics(was_applied=False))
