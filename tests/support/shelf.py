# SPDX-License-Identifier: Apache-2.0
"""A protocol of fsspec whose server is a folder: shelf:///PATH is the file PATH.

It counts requests, also those of other processes, and can be slow, cut transfers and fail.
"""

import os
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class Shelf(AbstractFileSystem):
    """Serves local files."""

    protocol = "shelf"
    cachable = False
    blocksize = 4096
    seconds_per_block: ClassVar[float] = 0.0
    faults: ClassVar[list[Callable[[bytes], bytes]]] = []
    """What happens to the content of the next transfers; each is used once."""

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Return size and version of a file."""
        status = Path(path).stat()
        stated = {"name": path, "size": status.st_size, "type": "file"}
        return stated | {"ETag": f"{status.st_ino}-{status.st_mtime_ns}"}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "Transfer":
        count(path)
        content = Path(path).read_bytes()
        return Transfer(self.faults.pop(0)(content) if self.faults else content)


class Transfer(BytesIO):
    """A file that takes its time."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(Shelf.seconds_per_block)
        return super().read(size)


def count(path: str) -> None:
    """Note one transfer of a file."""
    descriptor = os.open(f"{path}.transfers", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b".")
    os.close(descriptor)


def num_transfers(path: Path) -> int:
    """Return how often a file was transferred."""
    log = Path(f"{path}.transfers")
    return log.stat().st_size if log.is_file() else 0


fsspec.register_implementation("shelf", Shelf, clobber=True)
# A protocol whose package is not installed.
fsspec.register_implementation("absent", "absentfs.Absent", True, "Install absentfs")
