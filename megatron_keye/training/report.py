"""Reports a run to its user: progress, TensorBoard events, a closing table, summary.json.

Only rank 0 reports, since metrics are the same on all ranks.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from megatron_keye.config.run import RunConfig
from megatron_keye.training.metrics import StepMetrics


class Report:
    """Shows the steps of a run as they happen."""

    def __init__(self, run: RunConfig, first_step: int, last_step: int) -> None:
        """Create the run's folder, open it for events and write the configuration into it.

        Args:
            run: The run.
            first_step: Steps already done.
            last_step: Step after which this process stops.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "run.json").write_text(run.to_json())
        self._console = Console()
        self._events = SummaryWriter(str(run.folder / "events"))
        self._bar = Progress(
            TextColumn(run.name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", completed=first_step, total=last_step, figures="")
        self._last_step = last_step

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
        """Remove the bar and close the events."""
        self._bar.stop()
        self._events.close()

    def show(self, step: int, metrics: StepMetrics) -> None:
        """Show one finished step.

        Args:
            step: Steps done, this one included.
            metrics: Its metrics.
        """
        for name, value in metrics.scalars().items():
            self._events.add_scalar(f"train/{name}", value, step)
        mfu = "" if math.isnan(metrics.mfu) else f", MFU {metrics.mfu:.1%}"
        figures = (
            f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s  "
            f"{metrics.tflops_per_device:.3g} TFLOP/s per rank{mfu}  "
            f"step {metrics.step_seconds:.2f} s  "
            f"decoder {metrics.decoder_seconds:.2f} s  vision {metrics.vision_seconds:.2f} s "
            f"(waits {metrics.vision_wait_seconds:.2f})"
        )
        if not metrics.was_applied:
            figures += "  skipped: gradient not finite"
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal:
            self._console.out(f"step {step}/{self._last_step}  {figures}", highlight=False)

    def show_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Write the skipped samples to TensorBoard.

        Args:
            step: Steps done.
            num_skipped: Samples skipped since the run began.
            reasons: A sentence for each sample that was skipped since the last call.
        """
        self._events.add_scalar("data/skipped_samples", num_skipped, step)
        if reasons:
            self._events.add_text("data/skipped", "\n\n".join(reasons), step)


def write_summary(run: RunConfig, summary: dict[str, Any]) -> None:
    """Write the summary of a run to summary.json in its folder."""
    _summary_file(run).write_text(json.dumps(summary, indent=2) + "\n")


def read_summary(run: RunConfig) -> dict[str, Any]:
    """Return what `write_summary` wrote, or only the run's name if there is none."""
    file = _summary_file(run)
    summary: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"run": run.name}
    return summary


def show_summary(summary: dict[str, Any], note: str) -> None:
    """Print the summary of a run as a table, with a note below it."""
    table = Table(title=summary["run"], caption=note, show_header=False)
    for name, value in summary.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


def _summary_file(run: RunConfig) -> Path:
    return run.folder / "summary.json"
