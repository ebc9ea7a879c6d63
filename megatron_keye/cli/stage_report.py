# SPDX-License-Identifier: Apache-2.0
"""Shows how far the stages of a model are: a table, and a picture of their curves."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_keye.cli.stage_plan import PlannedStage
from megatron_keye.files.disk import writing
from megatron_keye.observe.curves import Curves, StageCurves, draw

METRICS = {"loss": "loss", "KL": "indexer_kl", "recall": "indexer_recall"}
"""Metrics of a step by their names in tables."""


def read_curves(folder: Path) -> Curves:
    """Return the metrics of a run by their names in METRICS.

    Args:
        folder: The run's folder, with the metrics.jsonl that training writes.

    Returns:
        Step and value of each finite one, in order; nothing for a run that has not begun.
    """
    file = folder / "metrics.jsonl"
    # Behind the last line break stands nothing, or a line that is being written.
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    return {
        name: [(step["step"], step[metric]) for step in steps if step[metric] is not None]
        for name, metric in METRICS.items()
    }


def print_table(model: str, stages: Sequence[PlannedStage], curves: Sequence[Curves]) -> None:
    """Print a line per stage: what learns, how far it is, and the metrics of its last step."""
    table = Table(title=f"stages of {model}", box=SIMPLE_HEAD)
    for heading in ("stage", "learns", "row", "steps saved", *METRICS):
        table.add_column(heading, justify="left" if heading in ("stage", "learns") else "right")
    for stage, its_curves in zip(stages, curves, strict=True):
        trained = stage.run.training.trained_parts
        table.add_row(
            stage.recipe.removeprefix(f"{model}_"),
            "all" if {"vision", "projector", "decoder"} <= set(trained) else " ".join(trained),
            f"{stage.run.data.row_tokens:,}",
            f"{stage.num_steps_saved:,} of {stage.last_step:,}",
            *(f"{curve[-1][1]:.4g}" if curve else "-" for curve in its_curves.values()),
        )
    Console().print(table)


def draw_stages(
    model: str, stages: Sequence[PlannedStage], curves: Sequence[Curves]
) -> Path | None:
    """Draw the curves of all stages into one picture.

    Returns:
        The picture; None if no stage has begun.
    """
    drawn = [
        StageCurves(
            name=stage.recipe.removeprefix(f"{model}_"),
            num_steps=stage.run.training.steps,
            curves=its_curves,
        )
        for stage, its_curves in zip(stages, curves, strict=True)
    ]
    if not any(points for stage in drawn for points in stage.curves.values()):
        return None
    file = Path(stages[0].run.output_dir) / f"{model}_stages.svg"
    with writing(file, "the curves of all stages"):
        file.write_text(draw(drawn, list(METRICS), title=f"{model}: all stages"))
    return file
