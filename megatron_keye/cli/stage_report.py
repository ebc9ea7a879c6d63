"""Shows how far the stages of a model are: a table, and a picture of their curves."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from megatron_keye.cli.stage_plan import PlannedStage
from megatron_keye.observe.curves import Curves, StageCurves, draw

METRICS = {"loss": "loss", "KL": "indexer_kl", "recall": "indexer_recall"}
"""Metrics of a step by their names in tables."""


def read_curves(folder: Path) -> Curves:
    """Return the metrics of a run by their names in METRICS.

    Args:
        folder: The run's folder.

    Returns:
        Step and value of each finite one, in order; nothing for a run that has not begun.
    """
    # 0 keeps all; by default TensorBoard keeps a sample.
    events = EventAccumulator(str(folder / "events"), size_guidance={SCALARS: 0})
    if (folder / "events").is_dir():
        events.Reload()
    known = events.Tags()[SCALARS]
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, metric in METRICS.items():
        scalars = events.Scalars(f"train/{metric}") if f"train/{metric}" in known else []
        # The last value of a step counts, if a crash made it run twice.
        values = {scalar.step: scalar.value for scalar in scalars}
        curves[name] = sorted((s, v) for s, v in values.items() if math.isfinite(v))
    return curves


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
    file.write_text(draw(drawn, list(METRICS), title=f"{model}: all stages"))
    return file
