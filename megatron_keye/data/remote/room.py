# SPDX-License-Identifier: Apache-2.0
"""Keeps all copies of a cache folder within a size, by removing those used least recently.

What is used is the sum that a small file holds, so that making room costs one look at all copies
each time a tenth of the size has been filled, not one for each copy.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.errors import UserError
from megatron_keye.files.lock import locked, locked_if_free

LOCK, STATE, PARTIAL_PREFIX = "lock", "state.json", "partial-"
_FILLED_AFTER_REMOVAL = 0.9


@dataclass(frozen=True)
class _Copy:
    """A folder of the cache that holds one file."""

    folder: Path
    size_bytes: int
    last_use: float


class CacheRoom:
    """The room of one cache folder, shared by all processes that name it.

    Args:
        folder: The cache folder.
        limit_bytes: Most bytes of all copies.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._used = folder / "used_bytes"

    def take(self, size_bytes: int) -> None:
        """Take room for one more copy; copies that no process reads are removed if need be.

        Raises:
            UserError: Without the file's name, when the copy alone is larger than the cache.
            RuntimeError: When all other copies are being read.
        """
        if size_bytes > self._limit_bytes:
            raise UserError(
                f"has {size_bytes:,} bytes, expected at most {self._limit_bytes:,}, which is "
                "data.remote.cache_gibibytes; raise it"
            )
        with locked(self._folder / LOCK, "exclusive"):
            used = self._read()
            if used is None or used + size_bytes > self._limit_bytes:
                used = self._shrink(int(_FILLED_AFTER_REMOVAL * self._limit_bytes) - size_bytes)
            if used + size_bytes > self._limit_bytes:
                raise RuntimeError(
                    f"{self._folder}: {used:,} bytes of it are being read, expected room for "
                    f"{size_bytes:,} more; raise data.remote.cache_gibibytes"
                )
            self._write(used + size_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Give back the room of a copy that was not made."""
        with locked(self._folder / LOCK, "exclusive"):
            self._write(max(0, (self._read() or 0) - size_bytes))

    def _read(self) -> int | None:
        """Return what is used; None when nobody has counted, or was killed while writing."""
        with suppress(FileNotFoundError, ValueError):
            return int(self._used.read_text())
        return None

    def _write(self, used: int) -> None:
        self._used.write_text(f"{used}\n")

    def _shrink(self, most_bytes: int) -> int:
        """Remove copies until the others take at most so much, and return what they take."""
        copies = sorted(self._copies(), key=lambda copy: copy.last_use)
        used = sum(copy.size_bytes for copy in copies)
        for copy in copies:
            if used <= most_bytes:
                break
            with locked_if_free(copy.folder / LOCK) as is_free:
                if is_free:
                    used -= copy.size_bytes
                    for path in list(copy.folder.iterdir()):
                        path.unlink()
                    with suppress(OSError):  # Someone may wait for the lock already.
                        copy.folder.rmdir()
        return used

    def _copies(self) -> Iterator[_Copy]:
        """Yield all copies, those that are being made with the size that they will have."""
        for group in (entry for entry in os.scandir(self._folder) if entry.is_dir()):
            for entry in os.scandir(group):
                with suppress(FileNotFoundError):
                    yield _measure(Path(entry))


def _measure(folder: Path) -> _Copy:
    size_bytes, last_use = 0, 0.0
    for entry in os.scandir(folder):
        if entry.name.startswith(PARTIAL_PREFIX):
            size_bytes += int(entry.name.removeprefix(PARTIAL_PREFIX))
        elif entry.name == STATE:
            last_use = entry.stat().st_mtime
        elif entry.name != LOCK:
            size_bytes += entry.stat().st_size
    return _Copy(folder=folder, size_bytes=size_bytes, last_use=last_use)
