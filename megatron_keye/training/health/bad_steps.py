# SPDX-License-Identifier: Apache-2.0
"""Tells bad steps and limits them: a file for each, and the end of the run or its way back."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.errors import UserError
from megatron_keye.training.health.bad_step import BadStep, bad_step_file
from megatron_keye.training.health.judge import Finding, Judge
from megatron_keye.training.health.wording import first_of
from megatron_keye.training.metrics import StepMetrics

_logger = logging.getLogger(__name__)


class BadSteps:
    """Counts the bad steps in a row; the same on all ranks."""

    def __init__(self, run: RunConfig, judge: Judge, *, rank: int) -> None:
        """Start at none.

        Args:
            run: Limits, and the settings that are likely causes.
            judge: Its finding of the last step is read.
            rank: This rank; rank 0 writes and logs.
        """
        self._run, self._judge, self._rank = run, judge, rank
        self._num_in_row = 0
        self._had_labels = False

    def note(
        self,
        step: int,
        metrics: StepMetrics,
        *,
        rows: Sequence[PackedRow],
        data: dict[str, Any],
        checkpoint: Path | None,
    ) -> bool:
        """Count one step, and write what is known of a bad one.

        Args:
            step: Steps done, this one included.
            metrics: Its metrics.
            rows: Its rows.
            data: Position of the data before it.
            checkpoint: Newest checkpoint.

        Returns:
            Whether the run must go back to a checkpoint.

        Raises:
            UserError: When the run ends here.
        """
        self._num_in_row = 0 if metrics.was_applied else self._num_in_row + 1
        self._had_labels |= not math.isnan(metrics.loss) or metrics.gradient_norm == math.inf
        finding, training = self._judge.finding, self._run.training
        if finding is None:
            return False
        bad = BadStep(
            step=step,
            reason=finding.reason,
            verdict=finding.verdict,
            loss=metrics.loss,
            gradient_norm=metrics.gradient_norm,
            learning_rate=metrics.learning_rate,
            was_applied=metrics.was_applied,
            sick_ranks=finding.sick_ranks,
            sick_tensors=finding.sick_tensors,
            samples=[list(row.sample_names) for row in rows],
            seed=training.seed,
            rows_per_step=training.rows_per_step,
            data=data,
            checkpoint=str(checkpoint or ""),
        )
        if self._rank == 0:
            bad.write(self._run)
            _logger.warning("%s", self._told(bad))
        return self._goes_back(bad, finding, metrics)

    def _goes_back(self, bad: BadStep, finding: Finding, metrics: StepMetrics) -> bool:
        settings = self._run.training.health
        if finding.is_irreproducible:
            if settings.on_irreproducible == "stop":
                raise UserError(f"training.health.on_irreproducible=stop: {self._told(bad)}")
        elif finding.is_spike and settings.on_spike == "stop":
            raise UserError(f"training.health.on_spike=stop: {self._told(bad)}")
        elif finding.is_spike and settings.on_spike == "roll_back":
            return True
        if self._num_in_row < settings.max_bad_steps:
            return False
        if settings.after_bad_steps == "roll_back":
            return True
        raise UserError(
            f"training.health.max_bad_steps: got {self._num_in_row} steps in a row that changed "
            f"no weight, expected fewer; {self._told(bad)}; {self._causes(metrics)}"
        )

    def check_learned(self, updates: int, metrics: StepMetrics) -> None:
        """Raise unless the run, which is at its last step, has learned from labels.

        Args:
            updates: Steps that changed weights since the run began.
            metrics: Metrics of the last step.

        Raises:
            UserError: When no step changed a weight, or none had a label although not only the
                indexers learn.
        """
        if not updates:
            raise UserError(
                f"{self._run.name}: no step changed a weight; {self._causes(metrics)}; no "
                "checkpoint was saved at the end"
            )
        if not self._had_labels and not self._run.training.only_indexers_learn:
            raise UserError(
                f"{self._run.name}: no step had a label to learn from, expected some; with "
                f"data.on_bad_sample={self._run.data.on_bad_sample} the log names samples that "
                "were left out; no checkpoint was saved at the end"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the count and what the judge compares with, ready for JSON."""
        return {
            "num_in_row": self._num_in_row,
            "had_labels": self._had_labels,
            "before": self._judge.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; from no step with an empty one."""
        self._num_in_row = state.get("num_in_row", 0)
        self._had_labels = state.get("had_labels", False)
        self._judge.load_state_dict(state.get("before", {}))

    def _told(self, bad: BadStep) -> str:
        """Return a bad step in a sentence."""
        sick = f", in {first_of(bad.sick_tensors)}" if bad.sick_tensors else ""
        parts = [
            f"step {bad.step} {'changed weights' if bad.was_applied else 'changed no weight'}, "
            f"{bad.reason}{sick}",
            bad.verdict,
            f"its samples are {first_of(bad.names)}",
            f"--replay {bad_step_file(self._run, bad.step)} computes it again",
        ]
        return "; ".join(part for part in parts if part)

    def _causes(self, metrics: StepMetrics) -> str:
        training = self._run.training
        return (
            f"loss {metrics.loss:.4g}, indexer KL {metrics.indexer_kl:.4g}; likely causes are "
            "weights that are not finite "
            f"(training.checkpoint.weights={training.checkpoint.weights or '""'}; megatron-keye "
            "convert --check-finite finds them), a training.optimizer.learning_rate too high "
            f"(got {training.optimizer.learning_rate}) or a loss weight "
            f"(training.indexer_loss_weight={training.indexer_loss_weight}, "
            "model.decoder.experts.balance_loss_weight="
            f"{self._run.model.decoder.experts.balance_loss_weight})"
        )
