# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the spans of all ranks, and derives times and a Chrome trace from them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_keye.errors import UserError
from megatron_keye.observe.recorder import StepRecorder
from megatron_keye.observe.span import Span, SpanName

VISION: tuple[SpanName, ...] = ("decode", "encode", "send", "vision")
"""Spans of work on pictures."""
DECODER: tuple[SpanName, ...] = ("forward", "backward", "return")
"""Spans of work on tokens."""


@dataclass(frozen=True)
class Timeline:
    """One step on all ranks."""

    spans: dict[int, list[Span]]
    """Spans of each rank."""
    peak_memory_mib: dict[int, float]
    """Peak of the memory of tensors on each rank's GPU during the step; 0 on a CPU."""

    @property
    def seconds(self) -> float:
        """Duration of the step, from the common start to the end of the last span."""
        return max(span.end for spans in self.spans.values() for span in spans)

    def busy_seconds(self, rank: int, names: Sequence[SpanName] | None = None) -> float:
        """Return how long a rank worked, in spans of these names or in all except waits."""
        spans = self.spans[rank]
        return covered(s for s in spans if (s.name in names if names else s.name != "wait"))

    def vision_seconds(self) -> float:
        """Return the time of work on pictures on the busiest rank."""
        return max(self.busy_seconds(rank, VISION) for rank in self.spans)

    def decoder_seconds(self) -> float:
        """Return the decoder's time without waits for features, on the slowest rank.

        Waits of pipeline stages for each other count, as they occur without pictures too.
        """
        longest = 0.0
        for spans in self.spans.values():
            passes = [span for span in spans if span.name in DECODER]
            if passes:
                start, end = min(s.start for s in passes), max(s.end for s in passes)
                waits = [s for s in spans if s.name == "wait" and start <= s.start <= end]
                longest = max(longest, end - start - covered(waits))
        return longest


def covered(spans: Iterable[Span]) -> float:
    """Return the seconds that spans cover together; overlaps count once."""
    total, reached = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def write_step(
    run_folder: Path, step: int, rank: int, device: torch.device, recorder: StepRecorder
) -> None:
    """Append one step of this rank to its file.

    Args:
        run_folder: Folder of the run; files go to timeline/ in it.
        step: 0-based number of the step.
        rank: This rank.
        device: Where it computes; on a GPU the counter of peak memory is reset.
        recorder: Recorder of this step.
    """
    folder = run_folder / "timeline"
    folder.mkdir(parents=True, exist_ok=True)
    peak = 0.0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    spans = [asdict(span) for span in recorder.spans()]
    line = json.dumps({"step": step, "peak_memory_mib": peak, "spans": spans})
    with (folder / f"rank-{rank:05d}.jsonl").open("a") as file:
        file.write(line + "\n")


def read_steps(run_folder: Path) -> dict[int, Timeline]:
    """Return the timelines that all ranks wrote, by step.

    Args:
        run_folder: Folder of the run.

    Raises:
        UserError: If the run has no timeline.
    """
    spans: dict[int, dict[int, list[Span]]] = defaultdict(dict)
    peaks: dict[int, dict[int, float]] = defaultdict(dict)
    for path in sorted((run_folder / "timeline").glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for line in path.read_text().splitlines():
            record = json.loads(line)
            spans[record["step"]][rank] = [Span(**span) for span in record["spans"]]
            peaks[record["step"]][rank] = record["peak_memory_mib"]
    if not spans:
        raise UserError(
            f"{run_folder}: got no timeline, expected timeline/rank-*.jsonl; train with --set "
            "training.records_timeline=true"
        )
    return {step: Timeline(spans[step], peaks[step]) for step in sorted(spans)}


def chrome_trace(steps: dict[int, Timeline]) -> dict[str, Any]:
    """Return all steps in a row, in the format of chrome://tracing and ui.perfetto.dev."""
    events: list[dict[str, Any]] = []
    offset = 0.0
    for number, timeline in steps.items():
        for rank, spans in timeline.spans.items():
            events += [
                {
                    "name": span.name,
                    "cat": f"step {number}",
                    "ph": "X",
                    "ts": (offset + span.start) * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "pid": rank,
                    "tid": 0,
                    "args": {"step": number, "on": span.label},
                }
                for span in spans
            ]
        offset += timeline.seconds
    ranks = sorted({rank for timeline in steps.values() for rank in timeline.spans})
    events += [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in ranks
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
