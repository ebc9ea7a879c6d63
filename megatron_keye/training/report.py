# SPDX-License-Identifier: Apache-2.0
"""Reports a run to its user: a line or a bar per step, files and curves, a closing table.

Only rank 0 reports, since metrics are the same on all ranks.
"""

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_keye.checkpoint.saver import Saved
from megatron_keye.config.run import RunConfig
from megatron_keye.observe.stragglers import Slowness
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.sinks import Losses, Scores, open_sinks

_NOTABLE_SHARE = 0.05
"""Share of a step from which a wait is worth a place on the step's line."""
_WAITS = {
    "data_wait_seconds": "waits {:.3g} s for rows",
    "save_seconds": "pauses {:.3g} s to save",
    "vision_wait_seconds": "vision waits {:.3g} s for pictures",
}
"""Metrics that are waits, and how the line tells of them."""


class Report:
    """Shows the steps of a run as they happen, and writes them to the run's sinks."""

    def __init__(self, run: RunConfig, first_step: int, last_step: int) -> None:
        """Create the run's folder, write the configuration into it and open the sinks.

        Args:
            run: The run.
            first_step: Steps already done.
            last_step: Step after which this process stops.

        Raises:
            UserError: If a sink that the run asks for cannot be opened.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "run.json").write_text(run.to_json())
        self._run, self._console = run, Console()
        self._sinks = open_sinks(run, first_step)
        self._bar = Progress(
            TextColumn(run.name),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", completed=first_step, total=last_step, figures="")
        self._last_step = last_step
        self._begun: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar and close the sinks."""
        self._bar.stop()
        for sink in self._sinks:
            sink.close(failed=kind is not None)

    def show(self, step: int, metrics: StepMetrics) -> None:
        """Show one finished step.

        Args:
            step: Steps done, this one included.
            metrics: Its metrics.
        """
        for sink in self._sinks:
            sink.log_step(step, metrics)
        figures = describe_step(metrics, seconds_left=self._seconds_left(step))
        self._bar.update(self._task, completed=step, figures=figures)
        self._print(f"step {step}/{self._last_step}  {figures}")

    def show_validation(self, step: int, losses: Losses) -> None:
        """Show the result of a validation.

        Args:
            step: Steps done.
            losses: Figures by source; "all" are all of them.
        """
        for sink in self._sinks:
            sink.log_validation(step, losses)
        parts = [f"{source} {figures['loss']:.4f}" for source, figures in losses.items()]
        self._bar.console.out(f"validation after step {step}: {', '.join(parts)}", highlight=False)

    def show_evaluation(self, step: int, scores: Scores) -> None:
        """Show the scores of an evaluation.

        Args:
            step: Steps done.
            scores: By task and metric.
        """
        for sink in self._sinks:
            sink.log_evaluation(step, scores)
        parts = [
            " ".join([task, *(f"{name} {value:.3f}" for name, value in of_task.items())])
            for task, of_task in scores.items()
        ]
        self._bar.console.out(f"evaluation after step {step}: {', '.join(parts)}", highlight=False)

    def show_saved(self, saved: Saved) -> None:
        """Show a checkpoint that is complete."""
        speed = saved.size_bytes / saved.seconds / 1e9
        self._bar.console.out(
            f"checkpoint {saved.folder.name}: training paused {saved.pause_seconds:.3g} s, "
            f"complete after {saved.seconds:.3g} s ({speed:.2g} GB/s per rank)",
            highlight=False,
        )

    def show_figures(self, step: int, figures: Mapping[str, float], line: str) -> None:
        """Write the figures of a step that learns from answers to the sinks, and show a line.

        Args:
            step: Steps done.
            figures: By name.
            line: The most important ones.
        """
        for sink in self._sinks:
            sink.log_figures(step, figures)
        self._bar.console.out(f"step {step}: {line}", highlight=False)

    def expect(self, last_step: int) -> None:
        """Change the step after which this process is expected to stop."""
        self._last_step = last_step
        self._bar.update(self._task, total=last_step)

    def go_back(self, step: int) -> None:
        """Let the steps after `step` be forgotten, since the run goes back to it."""
        for sink in self._sinks:
            sink.close(failed=False)
        self._sinks = open_sinks(self._run, step)
        self._bar.update(self._task, completed=step)
        self._begun = None

    def show_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Write the skipped samples to the sinks; the log names them already.

        Args:
            step: Steps done.
            num_skipped: Samples skipped since the run began.
            reasons: A sentence for each sample that was skipped since the last call.
        """
        for sink in self._sinks:
            sink.log_skipped(step, num_skipped, reasons)

    def show_slowness(self, step: int, slowness: Sequence[Slowness]) -> None:
        """Write a comparison of ranks to the sinks, and show the one furthest behind if notable.

        Args:
            step: Steps done.
            slowness: Of `TrainingStep`.
        """
        for sink in self._sinks:
            sink.log_slowness(step, slowness)
        notable = [str(slowest) for slowest in slowness if slowest.is_notable]
        if notable:
            self._bar.console.out(f"step {step}: {notable[0]}", highlight=False)

    def _print(self, line: str) -> None:
        """Print a line where there is no bar."""
        if not self._console.is_terminal:
            self._console.out(line, highlight=False)

    def _seconds_left(self, step: int) -> float:
        """Return the time to the last step, NaN after the first one, which also warms up."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = step, now
            return math.nan
        begun_step, begun = self._begun
        return (now - begun) / (step - begun_step) * (self._last_step - step)


def describe_step(metrics: StepMetrics, *, seconds_left: float) -> str:
    """Return a step in a line of at most 100 columns, less what is out of the ordinary.

    These are the figures by which one sees from afar whether a run learns, how fast it is and when
    it ends. Times by role and all others are in the run's files.

    Args:
        metrics: Metrics of the step.
        seconds_left: Time to the last step; NaN if not known.
    """
    has_kl, has_mfu = not math.isnan(metrics.indexer_kl), not math.isnan(metrics.mfu)
    memory = metrics.peak_memory_gib
    speed = f"MFU {metrics.mfu:.1%}" if has_mfu else f"{metrics.tflops_per_device:.2g} TFLOP/s"
    parts = [
        f"loss {metrics.loss:.4f}",
        f"KL {metrics.indexer_kl:.3f}" if has_kl else "",
        f"lr {metrics.learning_rate:.1e}",
        f"norm {metrics.gradient_norm:.3g}",
        f"{short_number(metrics.tokens_per_second)} tok/s",
        speed,
        f"{metrics.step_seconds:.3g} s",
        f"{memory:.{int(memory < 10)}f} GiB",
        "" if math.isnan(seconds_left) else f"left {short_time(seconds_left)}",
    ]
    for name, text in _WAITS.items():
        seconds = getattr(metrics, name)
        if seconds > _NOTABLE_SHARE * metrics.step_seconds:
            parts.append(text.format(seconds))
    if not metrics.was_applied:
        parts.append("no update: a bad step")
    return "  ".join(part for part in parts if part)


def short_number(value: float) -> str:
    """Return a number of 0 or more in at most five characters, as 525, 18.5K or 1.85M."""
    for suffix in ("", "K", "M"):
        if value < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}G"


def short_time(seconds: float) -> str:
    """Return a duration as h:mm:ss, from 100 hours on as days and hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}"
