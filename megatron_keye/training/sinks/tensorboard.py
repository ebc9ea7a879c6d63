# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, in events/ of the run's folder."""

import textwrap
from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from megatron_keye.config.run import RunConfig
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


class TensorBoard:
    """A `Sink` of curves and texts."""

    def __init__(self, run: RunConfig, first_step: int) -> None:
        """Open a new event file and write the configuration into it.

        Args:
            run: The run.
            first_step: Steps done; TensorBoard then hides later ones of a process that was lost.
        """
        self._num_rows = run.training.rows_per_step
        self._events = SummaryWriter(str(run.folder / "events"), purge_step=first_step + 1)
        # Markdown; at the first step that it holds for, so that a later start can hide it.
        self._events.add_text("run", textwrap.indent(run.to_json(), "    "), first_step + 1)

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Write a point of each curve."""
        self._add(step, step_scalars(metrics, num_rows=self._num_rows))

    def log_validation(self, step: int, losses: Losses) -> None:
        """Write a point of each curve of validation."""
        self._add(step, validation_scalars(losses))

    def log_evaluation(self, step: int, scores: Scores) -> None:
        """Write a point of each curve of evaluation."""
        self._add(step, evaluation_scalars(scores))

    def log_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Write the count as a curve, and the reasons as text."""
        self._add(step, {"data/skipped_samples": num_skipped})
        if reasons:
            self._events.add_text("data/skipped", "\n\n".join(reasons), step)

    def log_slowness(self, step: int, slowness: Sequence[Slowness]) -> None:
        """Write a point of the curves of each kind of work."""
        self._add(step, slowness_scalars(slowness))

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a point of the curves of learning from answers."""
        self._add(step, policy_scalars(figures))

    def close(self, *, failed: bool) -> None:
        """Write what is still in memory."""
        self._events.close()

    def _add(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
