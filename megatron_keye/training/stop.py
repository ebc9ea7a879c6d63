"""Lets a signal end a run after its step, with a checkpoint, instead of in the middle of it.

Slurm warns with USR1 and ends with TERM, a person presses Ctrl-C; often several come, to some
ranks or to all. A signal only leaves a mark; ranks agree on what to do with the step's metrics.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def hidden_from_children() -> Iterator[None]:
    """Start processes inside that never see these signals; this one sees them at the end.

    Slurm signals every process of a step. Megatron's checkpoints keep one for their results from
    the first save on, and the save of a stop would fail without it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Python's own helper of spawned processes unblocks INT and TERM when it starts, so it comes
    # before the second call, and after the first, as USR1 would end it.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Listen to nothing yet, so that building a run can still be interrupted."""
        self.name = ""
        """Of the first signal that came, "" before."""

    def listen(self) -> None:
        """Take the signals from now on; any number of them is as one."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
