"""Lets a signal end a run after the current step, with a checkpoint.

Slurm warns with USR1 and ends with TERM, a user presses Ctrl-C; often several arrive, at some
ranks or at all. A signal is only noted; ranks agree to stop when they reduce the step's metrics.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def hidden_from_children() -> Iterator[None]:
    """Block these signals for processes started inside; this one gets them at the end.

    Slurm signals every process of a step. Megatron's checkpointing keeps a process from the first
    save on, and the save at a stop would fail if a signal had ended it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Python's resource tracker unblocks INT and TERM when it starts, so they are blocked again
    # after it; it starts after the first call, since USR1 would end it.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Install no handler yet, so that signals can still interrupt the building of a run."""
        self.name = ""
        """Name of the first signal, "" before."""

    def listen(self) -> None:
        """Handle the signals from now on; those after the first have no effect.

        Also one that the start of the process has blocked, so that it would not end it.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
