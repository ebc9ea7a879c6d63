# SPDX-License-Identifier: Apache-2.0
"""Processes that end with the one that started them, however it dies, KILL included.

Linux tells a process of its parent's death, but means the thread that forked it: a process that
another thread than the main one forks watches its parent itself.
"""

import ctypes
import multiprocessing
import os
import select
import signal
import threading
import time
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from megatron_keye.files.temporary import remove_leftovers

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_SECONDS_TO_CLOSE_FILES = 5.0
_forking = threading.local()
"""What the forking thread leaves for its child: its process, and whether it is the main thread."""


def end_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent ends.

    For a process that its parent's main thread has forked; it stays so when another program is
    executed. Processes that this one starts are not concerned (`take_children_along`).

    Args:
        parent: The parent's number, read before it could end: if it has ended since, this process
            ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"PR_SET_PDEATHSIG: {os.strerror(error)}")
    if os.getppid() != parent:
        _end()


def take_children_along() -> None:
    """Make every process that this one forks or spawns from now on end with it.

    And so those that they fork. Other programs are not concerned, nor are multiprocessing's fork
    server and resource tracker, which end by themselves when nobody is left whom they serve.
    """
    os.register_at_fork(before=_note_thread, after_in_child=_end_with_forking_thread)
    # Libraries spawn too, as Megatron-Core does to save, and multiprocessing has no hook for it.
    command_line = spawn.get_command_line
    root = str(Path(__file__).parents[2])

    def ending_with_this_process(**names: Any) -> list[str]:
        command = command_line(**names)
        code = command.index("-c") + 1
        command[code] = (
            f"import sys; sys.path.append({root!r}); "
            f"from megatron_keye.files import children; children.end_with_starter(); "
            f"children.take_children_along(); {command[code]}"
        )
        return command

    spawn.get_command_line = ending_with_this_process


def end_with_starter() -> None:
    """End this process of multiprocessing, and remove its files, when who asked for it has ended.

    The parent may be the fork server, which lives as long as any process that it forked.
    """

    def watch() -> None:
        # Known when the work of this process begins.
        while (starter := multiprocessing.parent_process()) is None:
            time.sleep(_POLL_SECONDS)
        starter.join()
        # It has closed one file so far; the locks of its leftovers may be still to come.
        if starter.pid is not None:
            _await_end(starter.pid, timeout_seconds=_SECONDS_TO_CLOSE_FILES)
        remove_leftovers()
        _end()

    threading.Thread(target=watch, daemon=True).start()


def _note_thread() -> None:
    _forking.process = os.getpid()
    _forking.is_main = threading.current_thread() is threading.main_thread()


def _end_with_forking_thread() -> None:
    if _forking.is_main:
        end_with_parent(_forking.process)
    else:
        watch = threading.Thread(target=_watch, args=(_forking.process,), daemon=True)
        watch.start()


def _watch(parent: int) -> None:
    """End this process when its parent has ended."""
    # The number may be another process's by the time that it is looked at.
    while os.getppid() == parent:
        _await_end(parent)
    _end()


def _await_end(process: int, timeout_seconds: float | None = None) -> None:
    """Return when a process has ended, or was not there."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [], timeout_seconds)
    finally:
        os.close(descriptor)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
