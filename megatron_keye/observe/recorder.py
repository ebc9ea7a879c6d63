# SPDX-License-Identifier: Apache-2.0
"""Tells the heartbeat what a step does, and records its spans where that is asked for.

On a GPU the times come from CUDA events in the stream, so that recording never synchronises within
a step.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.span import Span, SpanName

Mark = float | torch.cuda.Event | None
"""A point in time: seconds on a CPU, an event on a GPU, None without recording."""


class Recorder:
    """Tells the heartbeat alone; `StepRecorder` also records."""

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        """Tell a heartbeat.

        Args:
            heartbeat: Of this rank; by default one that nobody reads.
        """
        self._heartbeat = heartbeat or Heartbeat()

    @contextmanager
    def span(self, name: SpanName, label: str = "") -> Iterator[None]:
        """Record the time from entering to leaving the context.

        Args:
            name: Kind of work.
            label: The chunk or micro-batch that it is on; of a wait, what is waited for.
        """
        start = self.begin()
        waits_for = label if name == "wait" else ""
        with self._heartbeat.doing(name, label, exchange=waits_for), record_function(name):
            yield
        self.end(name, label, start)

    @contextmanager
    def exchange(self, label: str) -> Iterator[None]:
        """Tell the heartbeat, inside the context, of an exchange that is no span of its own."""
        beat = self._heartbeat
        with beat.doing(beat.work, beat.detail, exchange=label):
            yield

    def begin(self) -> Mark:
        """Return the present, as the start of a span that another function ends with `end`."""
        return None

    def end(self, name: SpanName, label: str, start: Mark) -> None:
        """Record a span that began at `start` and ends now."""

    def backward_of(self, output: Tensor, label: str) -> None:
        """Record as "backward" the time from the gradient of `output` to that pass's end.

        Megatron's schedule starts that pass, so a hook marks its start.
        """
        if not output.requires_grad:
            return
        beat = self._heartbeat

        def begin(gradient: Tensor) -> None:
            start, before = self.begin(), (beat.work, beat.detail, beat.exchange)
            beat.note("backward", label)

            def end() -> None:
                self.end("backward", label, start)
                beat.note(*before)

            torch.autograd.Variable._execution_engine.queue_callback(end)

        output.register_hook(begin)


class StepRecorder(Recorder):
    """Records one step. Create it right after a barrier: its clock starts then."""

    def __init__(self, device: torch.device, heartbeat: Heartbeat | None = None) -> None:
        """Start the clock.

        Args:
            device: Where this rank computes.
            heartbeat: Of this rank; by default one that nobody reads.
        """
        super().__init__(heartbeat)
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
        self._start = self.begin()
        self._marks: list[tuple[SpanName, str, Mark, Mark]] = []

    def begin(self) -> Mark:
        """Return the present; on a GPU, an event in the current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, name: SpanName, label: str, start: Mark) -> None:
        """Record a span that began at `start` and ends now."""
        self._marks.append((name, label, start, self.begin()))

    def spans(self) -> list[Span]:
        """Return all spans so far; synchronises with the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            Span(name=name, label=label, start=self._seconds(start), end=self._seconds(end))
            for name, label, start, end in self._marks
        ]

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float) and isinstance(self._start, float):
            return mark - self._start
        assert isinstance(mark, torch.cuda.Event), "a step has marks of one kind"
        assert isinstance(self._start, torch.cuda.Event), "a step has marks of one kind"
        return float(self._start.elapsed_time(mark)) / 1000
