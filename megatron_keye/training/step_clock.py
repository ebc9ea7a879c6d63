# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes, from the end of one step to the end of the next.

Nothing lies between two steps, so that rates leave nothing out.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from megatron_keye.observe.heartbeat import Heartbeat

Part = Literal["data_wait", "save", "validation"]


class StepClock:
    """Measures steps on this rank, and the parts of them that are no training."""

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        """Begin the first step.

        Args:
            heartbeat: Told of each part and step; by default one that nobody reads.
        """
        self.heartbeat = heartbeat or Heartbeat()
        """What this rank does."""
        self._began = time.perf_counter()
        self._parts: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._saved_seconds = 0.0

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time inside the context as a part of the step that has begun."""
        started = time.perf_counter()
        with self.heartbeat.doing(name):
            yield
        self._parts[name] += time.perf_counter() - started

    def note_saved(self, seconds: float) -> None:
        """Note how long a checkpoint took that became complete in this step, beside training."""
        self._saved_seconds = seconds

    def end_step(self) -> dict[str, float]:
        """End the step, begin the next one, and return the seconds of "step" and of each part.

        Also those of "saved", which are no part of it: from the beginning to the end of a save
        that became complete in the step; 0 without one.
        """
        now = time.perf_counter()
        seconds = {"step": now - self._began} | {str(name): of for name, of in self._parts.items()}
        seconds["saved"] = self._saved_seconds
        self._began, self._parts = now, dict.fromkeys(self._parts, 0.0)
        self._saved_seconds = 0.0
        return seconds
