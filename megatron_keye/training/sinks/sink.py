# SPDX-License-Identifier: Apache-2.0
"""What every place for a run's figures offers, and the names of scalars in those for curves.

Curves stand under this project's names and under those of Megatron-LM, so that dashboards made for
it show a run of ours beside its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_keye.observe.stragglers import Slowness
from megatron_keye.training.metrics import StepMetrics

Losses = Mapping[str, Mapping[str, float]]
"""Figures of a validation, "loss" among them, by name of its source; "all" are all of them."""

Scores = Mapping[str, Mapping[str, float]]
"""Means over the questions of an evaluation, by task and by name of the metric."""

_PERPLEXITY_EXPONENT = 20.0
"""Megatron-LM's limit of the loss in a perplexity, against overflow."""


class Sink(Protocol):
    """A place for the figures of a run. Only rank 0 has sinks; steps come in order."""

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Write the metrics of one step.

        Args:
            step: Steps done, this one included.
            metrics: Its metrics.
        """

    def log_validation(self, step: int, losses: Losses) -> None:
        """Write the result of a validation after `step` steps."""

    def log_evaluation(self, step: int, scores: Scores) -> None:
        """Write the scores of an evaluation after `step` steps."""

    def log_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Write the samples left out.

        Args:
            step: Steps done.
            num_skipped: Samples left out since the run began.
            reasons: A sentence for each that was left out since the last call.
        """

    def log_slowness(self, step: int, slowness: Sequence[Slowness]) -> None:
        """Write how far the slowest ranks lag behind their peers, where ranks were compared."""

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step that learns from answers (`post_training.figures`)."""

    def close(self, *, failed: bool) -> None:
        """Write what is still in memory; `failed` if an error ends the run."""


def step_scalars(metrics: StepMetrics, *, num_rows: int) -> dict[str, float]:
    """Return the curves of a step by name.

    Args:
        metrics: Metrics of the step.
        num_rows: Packed rows of the global batch; what Megatron-LM calls batch size.
    """
    ours = {f"train/{name}": value for name, value in metrics.scalars().items()}
    return ours | {
        "lm loss": metrics.loss,
        "grad-norm": metrics.gradient_norm,
        "learning-rate": metrics.learning_rate,
        "batch-size": float(num_rows),
        "iteration-time": metrics.step_seconds,
        "throughput": metrics.tflops_per_device,
        "mem-max-allocated-bytes": metrics.peak_memory_gib * 2**30,
    }


def slowness_scalars(slowness: Sequence[Slowness]) -> dict[str, float]:
    """Return the curves of a comparison of ranks by name."""
    scalars: dict[str, float] = {}
    for slowest in slowness:
        scalars[f"stragglers/{slowest.work}_ratio"] = slowest.ratio
        scalars[f"stragglers/{slowest.work}_rank"] = float(slowest.rank)
    return scalars


def evaluation_scalars(scores: Scores) -> dict[str, float]:
    """Return the curves of an evaluation by name."""
    return {
        f"evaluation/{task}/{name}": value
        for task, of_task in scores.items()
        for name, value in of_task.items()
    }


def policy_scalars(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the curves of a step that learns from answers by name, less what is not measured."""
    return {f"policy/{name}": of for name, of in figures.items() if not math.isnan(of)}


def validation_scalars(losses: Losses) -> dict[str, float]:
    """Return the curves of a validation by name; with those of Megatron-LM for each loss."""
    scalars = {}
    for source, figures in losses.items():
        suffix = "" if source == "all" else f"-{source}"
        for name, value in figures.items():
            scalars[f"validation/{source}/{name}"] = value
        loss = figures["loss"]
        scalars[f"lm loss validation{suffix}"] = loss
        scalars[f"lm loss validation{suffix} ppl"] = math.exp(min(_PERPLEXITY_EXPONENT, loss))
    return scalars
