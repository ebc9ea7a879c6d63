# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl in the run's folder: one JSON object a line, for pandas, jq and scripts.

A step is {"step": 1, "loss": ..., ...} with every metric by name. A validation is {"step": 1,
"validation": {source: {"loss": ...}}}, an evaluation {"step": 1, "evaluation": {task: {metric:
...}}}, and samples left out are {"step": 1, "skipped_samples": total, "reasons": [...]}. A
comparison of ranks is {"step": 1, "stragglers": {work: {"rank": 3, ...}}}. A step that learns from
answers is {"step": 1, "policy": {name: ...}} too. A number that is not finite is null, as JSON has
none.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.observe.stragglers import Slowness
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.sinks.sink import Losses, Scores


class JsonLines:
    """A `Sink` whose lines are complete on disk after every step."""

    def __init__(self, run: RunConfig, first_step: int) -> None:
        """Open the file, without what a process that was lost wrote after `first_step`."""
        path = run.folder / "metrics.jsonl"
        _cut_after(path, first_step)
        self._file = path.open("a")

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Write all metrics."""
        self._write({"step": step, **asdict(metrics)})

    def log_validation(self, step: int, losses: Losses) -> None:
        """Write the figures of each source."""
        self._write({"step": step, "validation": {name: dict(of) for name, of in losses.items()}})

    def log_evaluation(self, step: int, scores: Scores) -> None:
        """Write the scores of each task."""
        self._write({"step": step, "evaluation": {task: dict(of) for task, of in scores.items()}})

    def log_skipped(self, step: int, num_skipped: int, reasons: list[str]) -> None:
        """Write the count and the reasons, where there are new ones."""
        if reasons:
            self._write({"step": step, "skipped_samples": num_skipped, "reasons": reasons})

    def log_slowness(self, step: int, slowness: Sequence[Slowness]) -> None:
        """Write the slowest rank in each kind of work, where ranks were compared."""
        if slowness:
            of_work = {slowest.work: asdict(slowest) for slowest in slowness}
            self._write({"step": step, "stragglers": of_work})

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step that learns from answers."""
        self._write({"step": step, "policy": dict(figures)})

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()


def _cut_after(path: Path, last_step: int) -> None:
    """Cut the file at its first line of a later step, or that is not complete."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        length = 0
        for line in file:
            if _step_of(line) > last_step:
                break
            length += len(line)
        file.truncate(length)


def _step_of(line: bytes) -> float:
    """Return the step of a line, infinity if it is not complete."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    """Return the value with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
