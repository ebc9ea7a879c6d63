# SPDX-License-Identifier: Apache-2.0
"""An event loop in simulated time: processes that work, or wait for events."""

import heapq
from collections.abc import Generator


class Event:
    """Something that processes wait for; it happens once."""

    __slots__ = ("num_arrived", "time", "waiting")

    def __init__(self) -> None:
        self.time: float | None = None
        """When it happens or happened; None until that is known."""
        self.num_arrived = 0
        """How many have arrived at it so far."""
        self.waiting: list[Process] = []
        """Processes to resume then."""


Process = Generator[float | Event, None, None]
"""Yields seconds of work, which pass, or an event, which it waits for."""


class Clock:
    """Resumes processes in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._queue: list[tuple[float, int, Process]] = []
        self._num_pushed = 0
        self._num_running = 0

    def add(self, process: Process) -> None:
        """Start a process now."""
        self._num_running += 1
        self._push(self.now, process)

    def run(self) -> float:
        """Run until nothing is left, and return the time of the end."""
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            self._resume(process)
        assert self._num_running == 0, f"{self._num_running} processes are deadlocked"
        return self.now

    def has_happened(self, event: Event) -> bool:
        """Return whether an event lies in the past or happens now."""
        return event.time is not None and event.time <= self.now

    def trigger(self, event: Event, delay: float = 0.0) -> None:
        """Let an event happen, now or later."""
        event.time = self.now + delay
        for process in event.waiting:
            self._push(event.time, process)
        event.waiting.clear()

    def arrive(self, event: Event, num_expected: int, delay: float = 0.0) -> None:
        """Count an arrival; the last one triggers the event."""
        event.num_arrived += 1
        if event.num_arrived == num_expected:
            self.trigger(event, delay)

    def _resume(self, process: Process) -> None:
        for wanted in process:
            if not isinstance(wanted, Event):
                self._push(self.now + wanted, process)
                return
            if wanted.time is None:
                wanted.waiting.append(process)
                return
            if wanted.time > self.now:
                self._push(wanted.time, process)
                return
        self._num_running -= 1

    def _push(self, when: float, process: Process) -> None:
        self._num_pushed += 1
        heapq.heappush(self._queue, (when, self._num_pushed, process))
