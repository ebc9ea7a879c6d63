# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases: the curves of a run on its server, or in wandb/ of the run's folder."""

import json
import logging
from collections.abc import Mapping, Sequence

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.observe.stragglers import Slowness
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.sinks.sink import (
    Losses,
    Scores,
    evaluation_scalars,
    policy_scalars,
    slowness_scalars,
    step_scalars,
    validation_scalars,
)

_logger = logging.getLogger(__name__)


class Wandb:
    """A `Sink` that continues the same wandb run when the run is resumed."""

    def __init__(self, run: RunConfig) -> None:
        """Begin a run of wandb, or continue the one that an earlier process began.

        Raises:
            UserError: If wandb cannot begin, for example without a login.
        """
        import wandb

        settings = run.training.logging
        id_file = run.folder / "wandb_run_id.txt"
        known = id_file.read_text().strip() if id_file.is_file() else None
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity or None,
                mode=settings.wandb_mode,
                name=run.name,
                dir=run.folder,
                id=known,
                resume="allow",
                config=json.loads(run.to_json()),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"training.logging.wandb_project: got {settings.wandb_project!r}, but wandb does "
                f"not begin ({error}); run `wandb login`, or set "
                "training.logging.wandb_mode=offline"
            ) from error
        id_file.write_text(f"{self._run.id}\n")
        is_offline = settings.wandb_mode == "offline"
        _logger.info("wandb: %s", self._run.dir if is_offline else self._run.url)
        self._num_rows = run.training.rows_per_step
        # The server takes no step back: of those that a lost process has sent, its figures stay.
        self._first_step = self._run.step

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Send a point of each curve."""
        self._send(step, step_scalars(metrics, num_rows=self._num_rows))

    def log_validation(self, step: int, losses: Losses) -> None:
        """Send a point of each curve of validation."""
        self._send(step, validation_scalars(losses))

    def log_evaluation(self, step: int, scores: Scores) -> None:
        """Send a point of each curve of evaluation."""
        self._send(step, evaluation_scalars(scores))

    def log_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Send the count; the reasons are in the other sinks."""
        self._send(step, {"data/skipped_samples": num_skipped})

    def log_slowness(self, step: int, slowness: Sequence[Slowness]) -> None:
        """Send a point of the curves of each kind of work."""
        self._send(step, slowness_scalars(slowness))

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Send a point of the curves of learning from answers."""
        self._send(step, policy_scalars(figures))

    def close(self, *, failed: bool) -> None:
        """Send the rest, and mark the run as finished or failed."""
        self._run.finish(exit_code=1 if failed else 0)

    def _send(self, step: int, scalars: dict[str, float]) -> None:
        if step >= self._first_step:
            self._run.log(scalars, step=step)
