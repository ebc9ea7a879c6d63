# SPDX-License-Identifier: Apache-2.0
"""Progress bars on the terminal."""

from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar on standard error; implements `megatron_keye.files.progress.Progress`."""

    def __init__(self, what: str, *columns: ProgressColumn) -> None:
        """Make a bar named `what`, with `columns` to its right."""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        """Show the bar on a terminal; elsewhere it is written at the end, if work began."""
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Stop updating the bar; erase it if no work began, as before an error's sentence."""
        if self._bar.live.is_started:
            self._bar.live.transient = self._bar.tasks[self._task].total is None
            self._bar.stop()

    def begin(self, total: int, done: int = 0) -> None:
        """Set the total amount of work and the amount already done."""
        self._bar.update(self._task, total=total, completed=done)
        self._bar.start()

    def advance(self, amount: int) -> None:
        """Add the amount done since the last call."""
        self._bar.advance(self._task, amount)


def byte_bar(what: str) -> ProgressBar:
    """Return a bar that counts bytes and shows their rate."""
    return ProgressBar(what, DownloadColumn(), TransferSpeedColumn())


def sample_bar(what: str) -> ProgressBar:
    """Return a bar that counts samples."""
    return ProgressBar(what, MofNCompleteColumn(), TextColumn("samples"), TimeElapsedColumn())
