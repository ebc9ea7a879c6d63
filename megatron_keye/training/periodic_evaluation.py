# SPDX-License-Identifier: Apache-2.0
"""Asks a model questions while it trains; whoever starts the training brings what answers them.

So training knows nothing of generation, which is built on it.
"""

from collections.abc import Callable

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.process import Process
from megatron_keye.training.report import Report
from megatron_keye.training.sinks import Scores
from megatron_keye.training.step_clock import StepClock

Evaluate = Callable[[int], Scores]
"""Takes the number of steps done; all ranks call it together, and get the same scores."""
OpenEvaluation = Callable[[RunConfig, Grid, KeyeModel, Process], Evaluate]
"""Builds what evaluates on this rank, where the run asks for it."""


class PeriodicEvaluation:
    """The evaluations of a run, as its trainer sees them."""

    def __init__(self, run: RunConfig, clock: StepClock, evaluate: Evaluate | None) -> None:
        """Prepare for all evaluations.

        Args:
            run: When to evaluate.
            clock: Gets their time, as that of validations.
            evaluate: What answers; None where the run does not ask for it.
        """
        self._settings, self._clock, self._evaluate = run.training.evaluation, clock, evaluate

    def look(self, progress: Progress, report: Report | None, *, is_last: bool) -> None:
        """Evaluate if that is due. Collective: all ranks must call it after each step.

        It is also called before the first step of a process, for scores that a signal left no
        time for.

        Args:
            progress: Steps done, and those that were done at the last evaluation.
            report: Where scores are shown; None on ranks that report nothing.
            is_last: Whether the run has no more steps.
        """
        step = progress.step
        if self._evaluate is None or step == progress.evaluated_step:
            return
        if not self._settings.is_due(step, is_last=is_last):
            return
        with self._clock.part("validation"):
            scores = self._evaluate(step)
        progress.evaluated_step = step
        if report is not None:
            report.show_evaluation(step, scores)


def open_periodic_evaluation(
    run: RunConfig,
    grid: Grid,
    model: KeyeModel,
    process: Process,
    clock: StepClock,
    open_evaluation: OpenEvaluation | None,
) -> PeriodicEvaluation:
    """Open what the run asks for.

    Raises:
        UserError: For questions that cannot be read.
    """
    evaluate = None
    if run.training.evaluation.samples:
        if open_evaluation is None:
            raise ValueError("training.evaluation.samples: got some, expected what answers them")
        evaluate = open_evaluation(run, grid, model, process)
    return PeriodicEvaluation(run, clock, evaluate)
