# SPDX-License-Identifier: Apache-2.0
"""Takes a run back to its newest checkpoint, past the rows that were read since.

The run then equals one that never saw those rows: weights, moments, random states and the figures
that spikes are told by are the checkpoint's, and the data goes on where it is.
"""

import logging
from dataclasses import replace
from pathlib import Path

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.model import KeyeModel
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid

_logger = logging.getLogger(__name__)


class WayBack:
    """Goes back to checkpoints, a limited number of times to each."""

    def __init__(
        self, run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid
    ) -> None:
        """Prepare for any number of returns.

        Args:
            run: The limit.
            model: Takes the weights.
            optimizer: Takes moments and master weights.
            grid: Groups of this rank.
        """
        self._run, self._parts, self._rank = run, (model, optimizer, grid), grid.rank
        self._last: Path | None = None
        self._num_in_row = 0

    def __call__(self, progress: Progress, checkpoint: Path | None) -> Progress:
        """Load a checkpoint. Collective: all ranks must call it.

        Args:
            progress: Progress up to the bad step, which is counted in it.
            checkpoint: Newest checkpoint.

        Returns:
            That of the checkpoint, with the position of the data and the times as they are.

        Raises:
            UserError: When there is none, or the run was taken back to it too often.
        """
        most = self._run.training.health.max_roll_backs
        if checkpoint is None:
            raise UserError(
                f"step {progress.step}: got no checkpoint to go back to, expected one; set "
                "training.checkpoint.interval_steps, or stop instead "
                "(training.health.on_spike, training.health.after_bad_steps)"
            )
        self._num_in_row = self._num_in_row + 1 if checkpoint == self._last else 1
        self._last = checkpoint
        if self._num_in_row > most:
            raise UserError(
                f"training.health.max_roll_backs: got bad steps after {most} returns to "
                f"{checkpoint}, the last one step {progress.step}, expected healthy ones on other "
                "rows; bad_steps/ of the run's folder names their samples; lower "
                "training.optimizer.learning_rate, or raise the limit"
            )
        loaded = training_checkpoint.load(checkpoint, self._run, *self._parts)
        num_steps = progress.step - loaded.step
        if self._rank == 0:
            _logger.warning(
                "went back to %s, past the rows of %d steps (%d of %d times)",
                checkpoint,
                num_steps,
                self._num_in_row,
                most,
            )
        return replace(
            loaded,
            data=progress.data,
            seconds=progress.seconds,
            num_roll_backs=progress.num_roll_backs + 1,
            num_steps_rolled_back=progress.num_steps_rolled_back + num_steps,
        )
