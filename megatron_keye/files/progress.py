# SPDX-License-Identifier: Apache-2.0
"""The progress of long work: the library reports it, the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of some work, in bytes or whatever the work counts."""

    def begin(self, total: int, done: int = 0) -> None:
        """Take the amount of the whole work, and how much an earlier attempt has done of it."""

    def advance(self, amount: int) -> None:
        """Take the amount done since the last call."""


class NoProgress:
    """Ignores progress."""

    def begin(self, total: int, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int) -> None:
        """Do nothing."""
