# SPDX-License-Identifier: Apache-2.0
"""The saves of a run as its trainer sees them: begun, shown when complete, awaited at the end."""

from collections.abc import Callable
from pathlib import Path

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.saver import Saver
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.report import Report
from megatron_keye.training.step_clock import StepClock


class Saving:
    """Saves on one rank; what they take from training counts as a part of the next step."""

    def __init__(
        self, run: RunConfig, clock: StepClock, note_saved: Callable[[Path], None]
    ) -> None:
        """Prepare for all saves.

        Args:
            run: How to save, and where.
            clock: Gets the times of saves.
            note_saved: Called with each checkpoint that is complete, at a step's border.
        """
        self._run, self._clock = run, clock
        self._saver, self._note_saved = Saver(run), note_saved

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed; the ranks agree on it in the step's metrics."""
        return self._saver.has_failed

    def begin(
        self,
        model: KeyeModel,
        optimizer: JointOptimizer,
        grid: Grid,
        progress: training_checkpoint.Progress,
    ) -> None:
        """Begin a save once the one before is complete. Collective."""
        with self._clock.part("save"):
            training_checkpoint.begin_save(
                self._saver, self._run, model, optimizer, grid, progress
            )

    def look(self, report: Report | None, *, has_failed: bool) -> None:
        """Show saves that have become complete, at a step's border.

        Args:
            report: Where they are shown; None on ranks that report nothing.
            has_failed: Whether any rank knew before this border that a save failed.

        Raises:
            UserError: When one has failed, the same on all ranks.
        """
        if has_failed:
            self._saver.wait()
        for saved in self._saver.take_saved():
            self._clock.note_saved(saved.seconds)
            self._note_saved(saved.folder)
            if report is not None:
                report.show_saved(saved)

    def wait(self, report: Report | None) -> None:
        """Wait for the save at work, if any; all ranks must call it.

        Raises:
            UserError: When it has failed, the same on all ranks.
        """
        with self._clock.part("save"):
            self._saver.wait()
        self.look(report, has_failed=False)

    def close(self) -> None:
        """End saving, also after an error; a save at work may become complete."""
        self._saver.close()
