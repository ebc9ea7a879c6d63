# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose validations make no progress, and remembers the best of them."""

import math
from typing import Any

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.training.validation import ValidationResult


def is_validation_due(run: RunConfig, progress: Progress, *, is_last: bool) -> bool:
    """Return whether the losses after the steps done are wanted and not known yet.

    Args:
        run: When to validate.
        progress: Steps done, and those that were done at the last validation.
        is_last: Whether the run has no more steps.
    """
    step, interval = progress.step, run.training.validation.interval_steps
    if not run.data.validation_sources or step == progress.validated_step:
        return False
    return is_last or (interval > 0 and step % interval == 0)


def note_validation(run: RunConfig, progress: Progress, result: ValidationResult) -> bool:
    """Write the result of a validation into the progress; return whether it is the best so far.

    Where only indexers learn, the language loss stays as it is, and their KL counts.
    """
    total = result.total
    loss = total.indexer_kl if run.training.only_indexers_learn else total.loss
    progress.validated_step = progress.step
    # A NaN is no progress; the first number is.
    is_best = loss < progress.best_loss - run.training.validation.min_delta
    if is_best:
        progress.best_loss, progress.best_step = loss, progress.step
    progress.num_without_progress = 0 if is_best else progress.num_without_progress + 1
    return is_best


def early_end(run: RunConfig, progress: Progress) -> str:
    """Return why the run ends early, in a sentence; "" while it goes on."""
    patience, num_without = run.training.validation.patience, progress.num_without_progress
    if not patience or num_without < patience:
        return ""
    if math.isinf(progress.best_loss):
        return (
            f"ended after step {progress.step}: no loss of {num_without} validations is a number"
        )
    best = checkpoint_folder(run, progress.best_step)
    return (
        f"ended after step {progress.step}: no progress in {num_without} validations since step "
        f"{progress.best_step} with {progress.best_loss:.4f}, whose checkpoint is {best}; raise "
        "training.validation.patience to continue"
    )


def summarize_validation(progress: Progress, result: ValidationResult | None) -> dict[str, Any]:
    """Return what the run's summary says of the last validation and the best one, if any."""
    if result is None:
        return {}
    best = {"step": progress.best_step, "loss": progress.best_loss}
    return {"validation": result.figures(), "best_validation": best}
