# SPDX-License-Identifier: Apache-2.0
"""The summary of a run: summary.json in its folder, and the closing table."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.run import RunConfig
from megatron_keye.training.report import short_time
from megatron_keye.training.step_sums import StepSums

_SHOWN = {
    "tokens": ("tokens seen", ""),
    "tokens_per_second": ("rate", "tokens/s"),
    "tflops_per_device": ("rate per rank", "TFLOP/s"),
    "step_seconds": ("mean step", "s"),
    "peak_memory_gib": ("peak memory", "GiB"),
}
"""Label and unit of each figure whose name is not the best label."""


def summarize_steps(run: RunConfig, progress: Progress, sums: StepSums) -> dict[str, Any]:
    """Return what a run has done so far, restarts included, and what this process measured.

    Args:
        run: The run.
        progress: Its progress.
        sums: Of this process's steps, at least one.
    """
    parallel = run.parallel
    is_dedicated = parallel.vision.placement == "dedicated"
    vision = parallel.vision.num_ranks if is_dedicated else "on the decoder's ranks"
    return {
        "run": run.name,
        "steps": progress.step,
        "tokens": progress.tokens,
        "wall_seconds": progress.seconds,
        "first_loss": progress.first_loss,
        **sums.figures(),
        "ranks": {"decoder": parallel.decoder.num_ranks, "vision": vision},
        "skipped_samples": progress.data["num_skipped"],
        **_roll_backs(progress),
    }


def _roll_backs(progress: Progress) -> dict[str, int]:
    """Return how often the run went back to a checkpoint, and the steps it lost, if it did."""
    if not progress.num_roll_backs:
        return {}
    return {
        "roll_backs": progress.num_roll_backs,
        "steps_rolled_back": progress.num_steps_rolled_back,
    }


def write_summary(run: RunConfig, summary: dict[str, Any]) -> None:
    """Write the summary of a run to summary.json in its folder."""
    _summary_file(run).write_text(json.dumps(summary, indent=2) + "\n")


def read_summary(run: RunConfig) -> dict[str, Any]:
    """Return what `write_summary` wrote, or only the run's name if there is none."""
    file = _summary_file(run)
    summary: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"run": run.name}
    return summary


def show_summary(summary: dict[str, Any], note: str) -> None:
    """Print the summary of a run as a table, below it the checkpoint's path, whole, and a note."""
    table = Table(title=summary["run"], show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary.items():
        if name not in ("run", "checkpoint"):
            table.add_row(*_row(name, value))
    console = Console()
    console.print(table)
    # Not in the table, whose cells are cut or wrapped: a path is there to be copied.
    if summary.get("checkpoint"):
        console.out(f"checkpoint: {summary['checkpoint']}", highlight=False)
    if note:
        console.out(note, highlight=False)


def _row(name: str, value: Any) -> tuple[str, str]:
    """Return a figure's label, and its value with the unit."""
    label, unit = _SHOWN.get(name, (name.replace("_", " "), ""))
    match name, value:
        case "wall_seconds", _:
            return "wall time", short_time(value)
        case "mfu", _:
            return "MFU", f"{value:.1%}"
        case "padding_share", _:
            return "padding", f"{value:.1%}"
        case _, dict():
            shown = ", ".join(f"{part}: {of}" for part, of in value.items())
        case _, float():
            shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _, int():
            shown = f"{value:,}"
        case _:
            shown = str(value)
    return label, f"{shown} {unit}".rstrip()


def _summary_file(run: RunConfig) -> Path:
    return run.folder / "summary.json"
