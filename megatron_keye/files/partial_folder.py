"""A folder in the making: DIR.partial, continued after a kill, renamed when it is whole.

Each finished file leaves a record beside it, which is what a continued run skips by. Files get
their names only when they are complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_keye.errors import UserError

_PROGRESS = ".progress"
_FINGERPRINT = "fingerprint"


class PartialFolder:
    """What will become a folder, under a name that nobody takes for it."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Begin, or continue what a killed run with the same fingerprint left.

        Args:
            folder: The final folder; must not exist.
            fingerprint: Everything that decides the content.

        Raises:
            UserError: When the folder is there already.
        """
        if folder.exists():
            raise UserError(
                f"--out: got {folder}, which exists, expected a free name; remove it or choose "
                "another"
            )
        self.folder = folder
        self.path = folder.with_name(folder.name + ".partial")
        self._records = self.path / _PROGRESS
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        mark = self._records / _FINGERPRINT
        if not (mark.is_file() and mark.read_text() == digest):
            shutil.rmtree(self.path, ignore_errors=True)
            self._records.mkdir(parents=True)
            mark.write_text(digest)

    def record(self, name: str) -> Any:
        """Return the record of a finished file; None while it is not finished."""
        path = self._records / name
        return json.loads(path.read_text()) if path.is_file() else None

    def forget(self, name: str) -> None:
        """Have a finished file made again."""
        (self._records / name).unlink()

    def write(self, name: str, fill: Callable[[BinaryIO], Any]) -> None:
        """Write one file whole or not at all.

        Args:
            name: Name of the file.
            fill: Writes the content and returns the record, which JSON can hold.
        """
        # The process number keeps a leftover process of a killed run out of the way.
        temporary = self._records / f"{name}.{os.getpid()}"
        with temporary.open("wb") as stream:
            record = fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path / name)
        described = temporary.with_suffix(".json")
        described.write_text(json.dumps(record))
        described.replace(self._records / name)

    def finish(self) -> None:
        """Give the folder its final name."""
        shutil.rmtree(self._records)
        for path in self.path.rglob("*"):
            _sync(path)
        _sync(self.path)
        self.path.rename(self.folder)
        _sync(self.folder.parent)

    def promote(self, name: str) -> None:
        """Give a folder in this one the final name and remove all else."""
        whole = self.path / name
        for path in (*whole.rglob("*"), whole):
            _sync(path)
        whole.rename(self.folder)
        _sync(self.folder.parent)
        self.discard()

    def discard(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
