# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run as its trainer sees them: chosen, loaded, due, saved, exported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.export import export_checkpoint, take_carried_files
from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.history import PastRun
from megatron_keye.checkpoint.run_lock import RunLock, hold_run_folder
from megatron_keye.checkpoint.selection import choose_checkpoint
from megatron_keye.checkpoint.set_aside import set_aside
from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.parallel.process import Process
from megatron_keye.training import hand_over
from megatron_keye.training.report import Report
from megatron_keye.training.trained_model import TrainedModel


@dataclass(frozen=True)
class OpenedRun:
    """A run whose folder this process holds."""

    lock: RunLock
    checkpoint: Path | None
    """What it continues; None for a new run."""
    earlier: list[PastRun]
    """The runs that trained the weights which a new run starts from."""


def open_run(run: RunConfig, process: Process) -> OpenedRun:
    """Take a run's folder, and choose the checkpoint that its settings ask for.

    Raises:
        UserError: For degrees that do not fit the number of ranks, a folder that another run
            holds, a checkpoint that cannot be continued, or weights that its phase makes no sense
            after.
    """
    run.check_num_ranks(process.num_ranks)
    lock = hold_run_folder(run, process.rank)
    checkpoint = choose_checkpoint(run)
    return OpenedRun(lock, checkpoint, [] if checkpoint else hand_over.begin(run, process.rank))


def is_save_due(
    run: RunConfig, step: int, *, is_last: bool, was_stopped: bool, is_best: bool = False
) -> bool:
    """Return whether a checkpoint is saved after a step.

    Args:
        run: When to save.
        step: Steps done.
        is_last: Whether no step follows.
        was_stopped: Whether a signal ends the run here.
        is_best: Whether a validation after this step was the best so far.
    """
    settings = run.training.checkpoint
    is_at_interval = settings.interval_steps > 0 and step % settings.interval_steps == 0
    keeps_best = is_best and run.training.validation.patience > 0
    return is_at_interval or keeps_best or was_stopped or (is_last and settings.saves_last)


class RunCheckpoints:
    """Loads and saves on one rank; all ranks call it together."""

    def __init__(
        self,
        run: RunConfig,
        process: Process,
        opened: OpenedRun,
        trained: TrainedModel,
    ) -> None:
        """Prepare for all checkpoints.

        Args:
            run: How to save, and where.
            process: This rank.
            opened: From `open_run`.
            trained: What checkpoints hold, and what judges and saves it.
        """
        self._run, self._process, self._opened = run, process, opened
        self._state = (trained.model, trained.optimizer, trained.grid)
        self._health, self._saving, self._clock = trained.health, trained.saving, trained.clock

    def load(self, new: Progress, restore: Callable[[Progress], None]) -> Progress:
        """Load what the run continues, or the weights that it starts from; return its progress.

        Args:
            new: Of a run that continues nothing.
            restore: Takes a loaded progress up, and raises if it does not fit.

        Raises:
            UserError: For a checkpoint or weights that do not fit the run.
        """
        run, checkpoint, progress = self._run, self._opened.checkpoint, new
        if checkpoint is not None:
            progress = training_checkpoint.load(checkpoint, run, *self._state)
            restore(progress)
        elif run.training.checkpoint.weights:
            weights = Path(run.training.checkpoint.weights)
            training_checkpoint.load_weights(weights, run, *self._state)
        self._health.resume(progress, checkpoint)
        # What fails above leaves an earlier run where it is.
        if self._process.rank == 0:
            set_aside(run, self._opened.lock, continued=checkpoint)
            take_carried_files(run, checkpoint)
        return progress

    def save(
        self, progress: Progress, report: Report | None, *, is_last: bool, was_stopped: bool
    ) -> Path:
        """Begin a save, and export where that is due; return the checkpoint's folder.

        Args:
            progress: Of the run.
            report: Where saves are shown; None on ranks that report nothing.
            is_last: Whether no step follows.
            was_stopped: Whether a signal ends the run here, which leaves no time for an export.
        """
        self._opened.lock.check()
        self._saving.wait(report)  # The one before, which then is the newest.
        with self._clock.part("save"):
            self._health.check_before_save(progress)
        self._saving.begin(*self._state, progress)
        folder = checkpoint_folder(self._run, progress.step)
        if not was_stopped and self._run.training.checkpoint.exports(
            progress.step, is_last=is_last
        ):
            self._saving.wait(report)
            with self._clock.part("save"):
                export_checkpoint(self._run, folder)
        return folder
