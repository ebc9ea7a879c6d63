"""A progress bar that counts bytes."""

from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ByteProgress(AbstractContextManager["ByteProgress"]):
    """A bar with gigabytes per second."""

    def __init__(self, what: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def begin(self, total_bytes: int) -> None:
        """Take the number of bytes that will be written."""
        self._bar.update(self._task, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Take the number of bytes written since the last call."""
        self._bar.advance(self._task, num_bytes)
