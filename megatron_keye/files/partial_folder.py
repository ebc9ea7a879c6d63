# SPDX-License-Identifier: Apache-2.0
"""A folder under construction: DIR.partial, resumed after a kill, renamed when it is complete.

Each finished file leaves a record, by which a resumed run skips it. A file gets its name only
when it is complete. When the disk is full, nothing stays that would keep it full.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from megatron_keye.errors import UserError
from megatron_keye.files.disk import making, writing
from megatron_keye.files.written_file import FileSum, rename, sync, write_file, write_text

_RECORDS = ".records"
_FINGERPRINT = "fingerprint"


class PartialFolder:
    """A folder that is filled under a temporary name."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Start, or resume what a killed run with the same fingerprint left.

        Args:
            folder: The final folder; must not exist.
            fingerprint: Text of everything that decides the content.

        Raises:
            UserError: When the folder exists already.
            DiskError: When the disk does not take it.
        """
        if folder.exists():
            raise UserError(
                f"--out: got {folder}, which exists, expected a free name; remove it or choose "
                "another"
            )
        self.folder = folder
        self.path = folder.with_name(folder.name + ".partial")
        self._records = self.path / _RECORDS
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        mark = self._records / _FINGERPRINT
        with self.filling():
            if not (mark.is_file() and mark.read_text() == digest):
                shutil.rmtree(self.path, ignore_errors=True)
                self._records.mkdir(parents=True)
                mark.write_text(digest)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Remove everything when the disk refuses what is written in the `with` block.

        For the process that made the folder, around all that fills it.

        Raises:
            DiskError: For an error of the disk.
        """
        with making(self.path, str(self.folder)):
            yield

    def record(self, name: str) -> Any:
        """Return the record of a finished file; None while it is not finished."""
        path = self._records / name
        return json.loads(path.read_text())["record"] if path.is_file() else None

    def sum(self, name: str) -> FileSum:
        """Return the sum of a finished file."""
        return FileSum(**json.loads((self._records / name).read_text())["sum"])

    def forget(self, name: str) -> None:
        """Drop the record of a finished file, so that it is made again."""
        (self._records / name).unlink()

    def write(self, name: str, fill: Callable[[BinaryIO], Any]) -> None:
        """Write one file atomically.

        Args:
            name: Name of the file.
            fill: Writes the content, from front to back, and returns the record, ready for JSON.

        Raises:
            DiskError: When the disk does not take it; other files of the folder stay.
        """
        # The process id avoids a clash with a worker that outlived a killed run.
        temporary = self._records / f"{name}.{os.getpid()}"
        with writing(self.path, str(self.folder)):
            record, file_sum = write_file(temporary, fill)
            temporary.replace(self.path / name)
            recorded = temporary.with_suffix(".json")
            write_text(recorded, json.dumps({"record": record, "sum": asdict(file_sum)}))
            recorded.replace(self._records / name)

    def finish(self, complete: Callable[[], None] = lambda: None) -> None:
        """Give the folder its final name.

        Args:
            complete: Called last, when it holds nothing but what stays.
        """
        shutil.rmtree(self._records)
        complete()
        for path in self.path.rglob("*"):
            sync(path)
        sync(self.path)
        rename(self.path, self.folder)

    def promote(self, name: str) -> None:
        """Give a subfolder the final name and remove everything else."""
        subfolder = self.path / name
        for path in (*subfolder.rglob("*"), subfolder):
            sync(path)
        subfolder.rename(self.folder)
        sync(self.folder.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.path, ignore_errors=True)
