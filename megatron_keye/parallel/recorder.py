"""Notes when each phase of a step ran on this rank; a rank that does not record pays nothing.

On a GPU the times are those of the device, taken by events in the stream, so that recording never
waits for it within a step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal[
    "decode", "encode", "send", "wait", "forward", "backward", "return", "vision", "optimizer"
]
"""decode: files to patches. encode: the ViT forward. send: features leave. wait: for features, or
for gradients. forward, backward: the decoder. return: gradients of features leave. vision: the
ViT's second forward and its backward. optimizer: adding up gradients and updating."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One phase from its start to its end."""

    phase: Phase
    """What ran."""
    label: str
    """On what: a chunk of pictures or a micro-batch."""
    start: float
    """Seconds after the step's start, which all ranks have together."""
    end: float
    """Likewise."""


Mark = float | torch.cuda.Event | None
"""A point in time."""


class Recorder:
    """Records nothing; `StepRecorder` does."""

    @contextmanager
    def phase(self, phase: Phase, label: str = "") -> Iterator[None]:
        """Note start and end of what runs within.

        Args:
            phase: What runs.
            label: On what.
        """
        start = self.begin()
        yield
        self.end(phase, label, start)

    def begin(self) -> Mark:
        """Return a mark for `end`, where a phase does not end in the function that starts it."""
        return None

    def end(self, phase: Phase, label: str, start: Mark) -> None:
        """Note a phase that began at `start` and ends now."""

    def backward_of(self, output: Tensor, label: str) -> None:
        """Note the phase "backward" from when `output` gets its gradient to that pass's end."""


class StepRecorder(Recorder):
    """Records one step. Make it when all ranks have just met."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock.

        Args:
            device: Whose time is taken.
        """
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
        self._start = self.begin()
        self._marks: list[tuple[Phase, str, Mark, Mark]] = []

    def begin(self) -> Mark:
        """Return the present, of the stream on a GPU."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, phase: Phase, label: str, start: Mark) -> None:
        """Note a phase that began at `start` and ends now."""
        self._marks.append((phase, label, start, self.begin()))

    def backward_of(self, output: Tensor, label: str) -> None:
        """Note the backward pass; a schedule of others starts it, so a hook must tell when."""
        if not output.requires_grad:
            return

        def begin(gradient: Tensor) -> None:
            start = self.begin()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: self.end("backward", label, start)
            )

        output.register_hook(begin)

    def spans(self) -> list[Span]:
        """Return all phases; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            Span(phase=phase, label=label, start=self._seconds(start), end=self._seconds(end))
            for phase, label, start, end in self._marks
        ]

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float) and isinstance(self._start, float):
            return mark - self._start
        assert isinstance(mark, torch.cuda.Event), "one clock for a whole step"
        assert isinstance(self._start, torch.cuda.Event), "one clock for a whole step"
        return float(self._start.elapsed_time(mark)) / 1000
