# SPDX-License-Identifier: Apache-2.0
"""Lets a signal end a run after the current step, with a checkpoint.

Slurm warns with USR1 and ends with TERM, a user presses Ctrl-C; often several arrive, at some
ranks or at all. A signal is only noted; ranks agree to stop when they reduce the step's metrics.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
