# SPDX-License-Identifier: Apache-2.0
"""All that watches over the numbers of a run, as the trainer uses it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.health.bad_steps import BadSteps
from megatron_keye.training.health.judge import Judge
from megatron_keye.training.health.roll_back import WayBack
from megatron_keye.training.health.sick_tensors import check_before_save
from megatron_keye.training.metrics import StepMetrics


class RunHealth:
    """Judges steps before they change weights, and states before they are saved."""

    def __init__(
        self, run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid
    ) -> None:
        """Prepare for a run that begins; `resume` for one that continues.

        Args:
            run: Limits and what follows from them.
            model: This rank's modules.
            optimizer: Their optimizers.
            grid: Groups of this rank.
        """
        self.judge = Judge(run)
        """Decides whether a step changes weights."""
        self._parts = (model, optimizer, grid)
        self._bad_steps = BadSteps(run, self.judge, rank=grid.rank)
        self._way_back = WayBack(run, model, optimizer, grid)
        self._checkpoint: Path | None = None
        self._data: dict[str, Any] = {}

    def resume(self, progress: Progress, checkpoint: Path | None) -> None:
        """Continue where a progress was saved; a new run begins with its own.

        Args:
            progress: Of the checkpoint.
            checkpoint: Its folder; None for a new run.
        """
        self._checkpoint, self._data = checkpoint, progress.data
        self._bad_steps.load_state_dict(progress.health)

    def note(
        self, progress: Progress, metrics: StepMetrics, rows: Sequence[PackedRow], *, is_last: bool
    ) -> bool:
        """Note a step, and in its progress what later ones are compared with.

        Args:
            progress: With this step.
            metrics: Its metrics.
            rows: Its rows.
            is_last: Whether the run ends with it.

        Returns:
            Whether the run must go back to a checkpoint.

        Raises:
            UserError: When the run ends here for its health.
        """
        goes_back = self._bad_steps.note(
            progress.step, metrics, rows=rows, data=self._data, checkpoint=self._checkpoint
        )
        self._data, progress.health = progress.data, self._bad_steps.state_dict()
        if is_last and not goes_back:
            self._bad_steps.check_learned(progress.updates, metrics)
        return goes_back

    def go_back(self, progress: Progress) -> Progress:
        """Take weights and moments back to the newest checkpoint. Collective.

        Args:
            progress: Up to the bad step.

        Returns:
            Progress from which the run goes on, with the rows behind those it has read.

        Raises:
            UserError: When there is no checkpoint, or too many returns were to this one.
        """
        back = self._way_back(progress, self._checkpoint)
        self._bad_steps.load_state_dict(back.health)
        return back

    def check_before_save(self, progress: Progress) -> None:
        """Refuse to save a state that is not finite. Collective: all ranks must call it.

        Raises:
            UserError: On all ranks, naming weights or moments that are sick.
        """
        check_before_save(*self._parts, step=progress.step, kept=self._checkpoint)

    def note_saved(self, checkpoint: Path) -> None:
        """Note the folder of a checkpoint that is complete."""
        self._checkpoint = checkpoint
