"""Records the spans of a step on this rank; a rank that does not record pays nothing.

On a GPU the times are those of the device, taken by events in the stream, so that recording never
waits for it within a step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_keye.observe.span import Span, SpanName

Mark = float | torch.cuda.Event | None
"""A point in time."""


class Recorder:
    """Records nothing; `StepRecorder` does."""

    @contextmanager
    def span(self, name: SpanName, label: str = "") -> Iterator[None]:
        """Record start and end of what runs within.

        Args:
            name: What runs.
            label: On what.
        """
        start = self.begin()
        yield
        self.end(name, label, start)

    def begin(self) -> Mark:
        """Return a mark for `end`, where a span does not end in the function that starts it."""
        return None

    def end(self, name: SpanName, label: str, start: Mark) -> None:
        """Record a span that began at `start` and ends now."""

    def backward_of(self, output: Tensor, label: str) -> None:
        """Record the span "backward" from when `output` gets its gradient to that pass's end."""


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
        self._marks: list[tuple[SpanName, str, Mark, Mark]] = []

    def begin(self) -> Mark:
        """Return the present, of the stream on a GPU."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, name: SpanName, label: str, start: Mark) -> None:
        """Record a span that began at `start` and ends now."""
        self._marks.append((name, label, start, self.begin()))

    def backward_of(self, output: Tensor, label: str) -> None:
        """Record the backward pass; a schedule of others starts it, so a hook must tell when."""
        if not output.requires_grad:
            return

        def begin(gradient: Tensor) -> None:
            start = self.begin()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: self.end("backward", label, start)
            )

        output.register_hook(begin)

    def spans(self) -> list[Span]:
        """Return all spans; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            Span(name=name, label=label, start=self._seconds(start), end=self._seconds(end))
            for name, label, start, end in self._marks
        ]

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float) and isinstance(self._start, float):
            return mark - self._start
        assert isinstance(mark, torch.cuda.Event), "one clock for a whole step"
        assert isinstance(self._start, torch.cuda.Event), "one clock for a whole step"
        return float(self._start.elapsed_time(mark)) / 1000
