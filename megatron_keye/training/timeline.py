"""Writes down when each rank did what, and reads it back: for pictures, figures, the simulator."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_keye.config.run import RunConfig
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.recorder import Phase, Span, StepRecorder

VISION: tuple[Phase, ...] = ("decode", "encode", "send", "vision")
"""What a rank does for pictures."""
DECODER: tuple[Phase, ...] = ("forward", "backward", "return")
"""What a rank does for tokens."""


@dataclass(frozen=True)
class Timeline:
    """One step on all ranks."""

    spans: dict[int, list[Span]]
    """Phases of each rank."""
    peak_memory_mib: dict[int, float]
    """Most memory that tensors took on each rank's GPU during the step; 0 on a CPU."""

    @property
    def seconds(self) -> float:
        """From the common start to the end of the last phase."""
        return max(span.end for spans in self.spans.values() for span in spans)

    def busy_seconds(self, rank: int, phases: Sequence[Phase] | None = None) -> float:
        """Return how long a rank worked, in these phases or in any but waiting."""
        spans = self.spans[rank]
        return covered(s for s in spans if (s.phase in phases if phases else s.phase != "wait"))

    def vision_seconds(self) -> float:
        """Return the pictures' time on the rank that had most to do for them."""
        return max(self.busy_seconds(rank, VISION) for rank in self.spans)

    def decoder_seconds(self) -> float:
        """Return the decoder's time without waits for features, on the slowest rank.

        Pipeline stages wait for each other in it, as they would without any picture.
        """
        longest = 0.0
        for spans in self.spans.values():
            own = [span for span in spans if span.phase in DECODER]
            if own:
                start, end = min(s.start for s in own), max(s.end for s in own)
                waits = [s for s in spans if s.phase == "wait" and start <= s.start <= end]
                longest = max(longest, end - start - covered(waits))
        return longest


def covered(spans: Iterable[Span]) -> float:
    """Return how much time spans cover together; what overlaps counts once."""
    total, reached = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def write_step(run: RunConfig, process: Process, step: int, recorder: StepRecorder) -> None:
    """Append one step of this rank to its file in the run's folder."""
    folder = run.folder / "timeline"
    folder.mkdir(parents=True, exist_ok=True)
    peak = 0.0
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    spans = [asdict(span) for span in recorder.spans()]
    line = json.dumps({"step": step, "peak_memory_mib": peak, "spans": spans})
    with (folder / f"rank-{process.rank:05d}.jsonl").open("a") as file:
        file.write(line + "\n")


def read_steps(folder: Path) -> dict[int, Timeline]:
    """Read what all ranks wrote.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: When nothing was recorded there.
    """
    spans: dict[int, dict[int, list[Span]]] = defaultdict(dict)
    peaks: dict[int, dict[int, float]] = defaultdict(dict)
    for path in sorted((folder / "timeline").glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for line in path.read_text().splitlines():
            record = json.loads(line)
            spans[record["step"]][rank] = [Span(**span) for span in record["spans"]]
            peaks[record["step"]][rank] = record["peak_memory_mib"]
    if not spans:
        raise ValueError(
            f"{folder}: no timeline there, expected timeline/rank-*.jsonl; train with --set "
            "training.records_timeline=true"
        )
    return {step: Timeline(spans[step], peaks[step]) for step in sorted(spans)}


def chrome_trace(steps: dict[int, Timeline]) -> dict[str, Any]:
    """Return all steps for chrome://tracing or ui.perfetto.dev, one behind the other."""
    events: list[dict[str, Any]] = []
    offset = 0.0
    for number, timeline in steps.items():
        for rank, spans in timeline.spans.items():
            events += [
                {
                    "name": span.phase,
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
    names = sorted({rank for timeline in steps.values() for rank in timeline.spans})
    events += [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in names
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
