# SPDX-License-Identifier: Apache-2.0
"""Saves checkpoints beside the steps that follow: the run pauses for a copy in main memory.

A thread of each rank writes the rank's file; that of rank 0 adds the rest when all are written,
and gives the folder its name. Threads of the rank itself, since torch, zlib and the file system
work without the interpreter, and since a process would need a second copy or shared memory, and
could outlive its rank.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.one_save import Failure, Save, attempt
from megatron_keye.checkpoint.retention import partial_of, remove_leftovers
from megatron_keye.checkpoint.shards import (
    Part,
    TensorPart,
    parts_of,
)
from megatron_keye.config.run import RunConfig
from megatron_keye.parallel.mailbox import Mailbox

_CLOSING_SECONDS = 60.0
"""How long a run that has failed lets a save become complete."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    state: dict[str, Any]
    """Sharded tensors and objects, by group, and what is the same on all ranks."""
    texts: dict[str, str]
    """Its further files, by name."""
    best: Path
    """A checkpoint that stays whatever its age."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A save that is complete."""

    folder: Path
    """The checkpoint."""
    size_bytes: int
    """Bytes that this rank wrote."""
    pause_seconds: float
    """How long this rank's training stood still."""
    seconds: float
    """From the beginning of the pause to the folder's name."""


class Saver:
    """Saves the checkpoints of a run on one rank, one after the other."""

    def __init__(self, run: RunConfig) -> None:
        """Prepare for all saves; the ranks must have met.

        Args:
            run: How to save, and where.
        """
        self._run, self._rank = run, dist.get_rank()
        self._copies, self._is_first = HostCopies(), True
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._failure: Failure | None = None

    def begin(self, collect: Callable[[], Contents]) -> None:
        """Copy the state and let it be written. Collective; waits for the save before.

        Args:
            collect: Returns what the checkpoint holds.

        Raises:
            UserError: When the folder cannot be made, or the save before has failed, or, with
                training.checkpoint.asynchronous=false, this one; the same on all ranks.
        """
        started = time.perf_counter()
        self.wait()
        contents, is_asynchronous = collect(), self._run.training.checkpoint.asynchronous
        folder = checkpoint_folder(self._run, contents.step)
        mailbox = Mailbox(self._open(folder))
        # All saves of a run have the same structure, so that comparing it once will do.
        parts = parts_of(contents.state, self._rank, checks_whole=self._is_first)
        self._is_first = False
        if is_asynchronous:
            parts = self._copied(parts)
        save = Save(self._run, self._rank, folder, parts, contents.texts, contents.best, mailbox)
        # Nothing that was gathered for this save is held while it is at work.
        del contents
        pause_seconds = time.perf_counter() - started

        def work() -> None:
            answer = attempt(save, folder)
            if isinstance(answer, Failure):
                self._failure = answer
                return
            seconds = time.perf_counter() - started
            pause = pause_seconds if is_asynchronous else seconds
            self._saved.append(
                Saved(folder=folder, size_bytes=answer, pause_seconds=pause, seconds=seconds)
            )

        # A daemon, so that a file system that hangs does not keep a process that has failed.
        self._thread = threading.Thread(target=work, name="save checkpoint", daemon=True)
        self._thread.start()
        if not is_asynchronous:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether a save is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed, which `wait` raises; ranks learn it at different times."""
        return self._failure is not None

    def take_saved(self) -> list[Saved]:
        """Return the saves that have become complete since the last call."""
        return [self._saved.pop(0) for _ in range(len(self._saved))]

    def wait(self) -> None:
        """Wait until no save is at work.

        Raises:
            UserError: When one could not be written, the same on all ranks.
            RuntimeError: When one failed otherwise.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            self._failure.raise_it()

    def close(self) -> None:
        """Let a save at work become complete, for a while, after a run that may have failed."""
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)
        if not self.is_writing:
            self._copies.close()

    def _open(self, folder: Path) -> str:
        """Make the folder to write into, on rank 0; return a name for the save's messages."""
        answer: list[Any] = [None]
        if self._rank == 0:
            answer = [attempt(lambda: _make_folder(folder), folder)]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], Failure):
            self._failure = answer[0]
            self.wait()
        return str(answer[0])

    def _copied(self, parts: list[Part]) -> list[Part]:
        tensors = [part.data for part in parts if isinstance(part, TensorPart)]
        copies = iter(self._copies.copy(tensors))
        return [
            replace(part, data=next(copies)) if isinstance(part, TensorPart) else part
            for part in parts
        ]


def _make_folder(folder: Path) -> str:
    remove_leftovers(folder.parent)
    partial_of(folder).mkdir(parents=True)
    return f"save {secrets.token_hex(8)}"
