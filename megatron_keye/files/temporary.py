# SPDX-License-Identifier: Apache-2.0
"""Temporary files of this machine: those that processes share, and those that go with a process.

multiprocessing keeps its sockets in a folder that stays when the process is killed. A lock of the
folder's name, which the process holds, shows others when nobody needs it any more.
"""

import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import cache
from multiprocessing import process, util
from pathlib import Path

from megatron_keye.errors import UserError
from megatron_keye.files.lock import locked, locked_if_free

_AFTER_MULTIPROCESSING = -200
"""Priority at the end of the process; multiprocessing removes its files with -100."""


def shared_folder() -> Path:
    """Return the folder of all processes of this user on this machine, below TMPDIR.

    Raises:
        UserError: When it belongs to someone else.
    """
    folder = Path(tempfile.gettempdir()) / f"megatron_keye.{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(
            f"{folder}: belongs to another user, expected a folder of one's own for what "
            "processes share; remove it, or set TMPDIR"
        )
    return folder


@cache
def keep_sockets_removable() -> None:
    """Make `remove_leftovers` find the files of multiprocessing after this process was killed.

    A process that multiprocessing started after its parent had a folder uses the parent's, which
    is the parent's to keep.
    """
    remove_leftovers()
    if "tempdir" in getattr(process.current_process(), "_config", {}):
        return
    folder = Path(util.get_temp_dir())  # made once; a socket's path has 107 characters
    lock = shared_folder() / f"{folder.name}.lock"
    # Under its name only once it is held: others take a free lock for that of a killed process.
    unnamed = lock.with_suffix(".new")
    held = ExitStack()
    held.enter_context(locked(unnamed, "exclusive"))
    unnamed.rename(lock)
    os.register_at_fork(after_in_child=held.close)  # or a child would hold it too

    def let_go() -> None:
        lock.unlink(missing_ok=True)
        held.close()

    util.Finalize(None, let_go, exitpriority=_AFTER_MULTIPROCESSING)


def remove_leftovers() -> None:
    """Remove the files of processes that were killed."""
    for lock in shared_folder().glob("pymp-*.lock"):
        with locked_if_free(lock) as is_free:
            if is_free:
                shutil.rmtree(shared_folder().parent / lock.stem, ignore_errors=True)
                lock.unlink(missing_ok=True)
