# SPDX-License-Identifier: Apache-2.0
"""What a rank does at this moment, for those who ask when it hangs or has ended. Without torch.

Its main thread writes it at each change of work, which costs microseconds; the watchdog sends it
to the other ranks, and the launcher of one machine reads it from memory that both share.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

SLOW_WORK = frozenset(
    {"start", "build", "load", "data_wait", "decode", "save", "export", "validation"}
)
"""Work that shows no progress for long although it is well: a large file takes its time."""


@dataclass(kw_only=True)
class Heartbeat:
    """What one rank does; the fields that are sent are those of `to_text`."""

    rank: int = 0
    """Global rank."""
    role: str = ""
    """Its place in the grids, in words; "" until they are known."""
    host: str = field(default_factory=socket.gethostname)
    """Machine of the process."""
    pid: int = field(default_factory=os.getpid)
    """Number of the process."""
    pid_space: str = field(default_factory=lambda: _pid_space())
    """Where `pid` counts: equal for two processes that see each other's numbers."""
    folder: str = ""
    """The run's folder; "" until it is known."""
    step: int = 0
    """Step that it is in, from 1; 0 before the first."""
    is_first_step: bool = True
    """Whether this process has finished no step, so that kernels are still compiled."""
    work: str = "start"
    """Kind of work: a part of the run (`StepClock`), or of a step (`SpanName`)."""
    detail: str = ""
    """The chunk or micro-batch that it is on."""
    exchange: str = ""
    """The exchange that it waits for; "" where it waits for none."""
    num_marks: int = 0
    """Grows with each sign of progress."""
    num_beats: int = 0
    """Grows with each time it is sent, progress or not."""
    still_seconds: float = 0.0
    """Time since the last sign of progress, when it was sent."""
    end_signal: int = 0
    """Signal that the process answered by ending; 0 before."""
    publish: Callable[["Heartbeat"], None] | None = None
    """Called at each change; must be quick and not fail. Not sent."""

    @contextmanager
    def doing(self, work: str, detail: str = "", exchange: str = "") -> Iterator[None]:
        """Note what happens inside the context, and afterwards what happened before.

        An error leaves the note as it is, so that it can be told where the error came.

        Args:
            work: Kind of work.
            detail: What it is on.
            exchange: The exchange that it waits for, if that is all it does.
        """
        before = self.work, self.detail, self.exchange
        self.note(work, detail, exchange)
        yield
        self.note(*before)

    def note(self, work: str, detail: str = "", exchange: str = "") -> None:
        """Note what happens from now on, which is progress."""
        self.work, self.detail, self.exchange = work, detail, exchange
        self.mark()

    def begin_step(self, step: int) -> None:
        """Note that a step begins.

        Args:
            step: Its number, from 1.
        """
        self.is_first_step = self.step == 0
        self.step = step
        self.note("step")

    def mark(self) -> None:
        """Count a sign of progress."""
        self.num_marks += 1
        if self.publish is not None:
            self.publish(self)

    @property
    def is_slow(self) -> bool:
        """Whether what it does may take long without a sign of progress."""
        return self.is_first_step or self.work in SLOW_WORK

    def who(self) -> str:
        """Return rank, role and machine in words."""
        role = f" ({self.role})" if self.role else ""
        return f"rank {self.rank}{role} on {self.host or 'an unknown machine'}"

    def where(self) -> str:
        """Return step and work in words."""
        parts = [f"step {self.step}" if self.step else "before the first step"]
        if self.work not in ("step", "wait"):
            parts.append(f"{self.work} {self.detail}".rstrip())
        if self.exchange:
            parts.append(f"waiting for {self.exchange}")
        return ", ".join(parts)

    def how_to_go_on(self) -> str:
        """Return how a user continues the run, by the checkpoints in its folder."""
        if not self.folder:
            return "--resume auto goes on after the last checkpoint, if there is one"
        names = Path(self.folder, "checkpoints").glob("step-*")
        complete = sorted(p.name for p in names if p.name.removeprefix("step-").isdigit())
        if complete:
            step = int(complete[-1].removeprefix("step-"))
            return f"--resume auto goes on after step {step}"
        return "no checkpoint was saved, so the run begins anew"

    def to_text(self) -> str:
        """Return the heartbeat as one line of JSON."""
        return json.dumps({name: getattr(self, name) for name in _SENT})

    @classmethod
    def from_text(cls, text: str | bytes) -> "Heartbeat":
        """Return the heartbeat that `to_text` wrote.

        Raises:
            ValueError: For any other text.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != set(_SENT):
            raise ValueError("this is no heartbeat")
        return cls(**values)


_SENT = tuple(f.name for f in fields(Heartbeat) if f.name != "publish")


class Stillness:
    """Measures how long a heartbeat has shown no progress."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        """Begin now."""
        self._heartbeat = heartbeat
        self._num_marks, self._since = heartbeat.num_marks, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since progress was first seen to have stopped."""
        now = time.monotonic()
        if self._heartbeat.num_marks != self._num_marks:
            self._num_marks, self._since = self._heartbeat.num_marks, now
        return now - self._since

    def forget(self) -> None:
        """Begin again, since this process itself stood still."""
        self._since = time.monotonic()


def _pid_space() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} unknown"
