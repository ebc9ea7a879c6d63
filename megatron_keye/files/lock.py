# SPDX-License-Identifier: Apache-2.0
"""Locks between the processes of a machine, which end with the process that holds them."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_POLL_SECONDS = 0.05

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

LockKind = Literal["shared", "exclusive"]
_FLAGS = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX}


@contextmanager
def locked(
    path: Path,
    kind: LockKind,
    *,
    while_waiting: Callable[[], None] = lambda: None,
    needs_lock: bool = True,
) -> Iterator[None]:
    """Hold a lock on a file that is made if need be, with its folder.

    Args:
        path: The file; whoever holds the exclusive lock may remove it.
        kind: "shared" for any number of holders, "exclusive" for one alone.
        while_waiting: Called again and again until the lock is had.
        needs_lock: Whether an error of a file system that can't lock is raised; else the block
            runs without.
    """
    while True:
        descriptor = _open(path)
        try:
            while not _try(descriptor, kind, needs_lock=needs_lock):
                while_waiting()
                time.sleep(_POLL_SECONDS)
            if _is_still(path, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the exclusive lock of a file that nobody else holds; yield whether that is so."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try(descriptor, "exclusive") and _is_still(path, descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # Someone has removed the folder since.


def _try(descriptor: int, kind: LockKind, *, needs_lock: bool = True) -> bool:
    try:
        fcntl.flock(descriptor, _FLAGS[kind] | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if needs_lock or error.errno not in _CANNOT_LOCK:
            raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether the file that was locked is the one that has this name now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
