"""Saves checkpoints beside the steps that follow: the run pauses for a copy in main memory.

A thread of each rank writes the rank's file; that of rank 0 adds the rest when all are written,
and gives the folder its name. Threads of the rank itself, since torch, zlib and the file system
work without the interpreter, and since a process would need a second copy or shared memory, and
could outlive its rank. They agree by messages, not collectives, so that a save becomes complete
even while the run's main threads wait for each other, or end with an error.
"""

import pickle
import secrets
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_keye.checkpoint.convert.carried_files import carry_on
from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.retention import partial_of, prune, put_in_place, remove_leftovers
from megatron_keye.checkpoint.shard_plan import (
    Part,
    Placed,
    ShardPlan,
    file_of,
    write_parts,
)
from megatron_keye.checkpoint.storage_format import CONFIG, CONFIG_TEXT, METADATA
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.written_file import FileSum, write_file, write_text
from megatron_keye.parallel.mailbox import Mailbox

_PEERS_SECONDS = 3600.0
"""How long a thread waits for the files of other ranks, which may be slow; a dead rank ends the
run by other ways."""
_CLOSING_SECONDS = 60.0
"""How long a run that has failed lets a save become complete."""
_VERDICT = "verdict"


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


@dataclass(frozen=True)
class _Failure:
    """Why a rank's part of a save failed."""

    text: str
    """Sentence, or a traceback."""
    is_users: bool
    """Whether it is a sentence, about what a user can change."""


@dataclass(frozen=True)
class _Written:
    """What a rank wrote."""

    placed: Placed
    """Where its parts lie."""
    sums: dict[str, FileSum]
    """Sum of its file, by name; empty for a rank that writes nothing."""


class Saver:
    """Saves the checkpoints of a run on one rank, one after the other."""

    def __init__(self, run: RunConfig) -> None:
        """Prepare for all saves; the ranks must have met.

        Args:
            run: How to save, and where.
        """
        self._run, self._rank = run, dist.get_rank()
        self._plan, self._copies = ShardPlan(self._rank), HostCopies()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._failure: _Failure | None = None

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
        parts = self._plan.parts_of(contents.state)
        if is_asynchronous:
            parts = self._copied(parts)
        save = _Save(self._run, self._rank, folder, parts, contents, mailbox, self._plan)
        pause_seconds = time.perf_counter() - started

        def work() -> None:
            answer = _attempt(save)
            if isinstance(answer, _Failure):
                self._failure = answer
                return
            seconds = time.perf_counter() - started
            self._saved = Saved(
                folder=folder,
                size_bytes=answer,
                pause_seconds=pause_seconds if is_asynchronous else seconds,
                seconds=seconds,
            )

        # A daemon, so that a file system that hangs does not keep a process that has failed.
        self._thread = threading.Thread(target=work, name="save checkpoint", daemon=True)
        self._thread.start()
        if not is_asynchronous:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed, which `wait` raises; ranks learn it at different times."""
        return self._failure is not None

    def take_saved(self) -> Saved | None:
        """Return a save that has become complete, once; None while there is none."""
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> None:
        """Wait until no save is at work.

        Raises:
            UserError: When one could not be written, the same on all ranks.
            RuntimeError: When one failed otherwise.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure = self._failure
        if failure is not None:
            raise UserError(failure.text) if failure.is_users else RuntimeError(failure.text)

    def close(self) -> None:
        """Let a save at work become complete, for a while, after a run that may have failed."""
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self._copies.close()

    def _open(self, folder: Path) -> str:
        """Make the folder to write into, on rank 0; return a name for the save's messages."""
        answer: list[Any] = [None]
        if self._rank == 0:
            answer = [_attempt(lambda: _make_folder(folder))]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], _Failure):
            self._failure = answer[0]
            self.wait()
        return str(answer[0])

    def _copied(self, parts: list[Part]) -> list[Part]:
        tensors = [part.data for part in parts if isinstance(part.data, torch.Tensor)]
        copies = iter(self._copies.copy(tensors))
        return [
            Part(part.item, next(copies)) if isinstance(part.data, torch.Tensor) else part
            for part in parts
        ]


@dataclass(frozen=True)
class _Save:
    """One save on one rank: its thread's work."""

    run: RunConfig
    rank: int
    folder: Path
    parts: list[Part]
    contents: Contents
    mailbox: Mailbox
    plan: ShardPlan

    def __call__(self) -> int:
        """Write this rank's part, learn whether all became a checkpoint, return this part's bytes.

        Raises:
            UserError: When a rank could not write.
            RuntimeError: When a rank failed otherwise.
        """
        written = _attempt(self._write)
        self.mailbox.post(str(self.rank), pickle.dumps(written))
        if self.rank == 0:
            self.mailbox.post(_VERDICT, pickle.dumps(_attempt(self._complete)))
        verdict = pickle.loads(self.mailbox.collect([_VERDICT], _PEERS_SECONDS)[0])
        if isinstance(verdict, _Failure):
            raise UserError(verdict.text) if verdict.is_users else RuntimeError(verdict.text)
        assert isinstance(written, _Written), "the verdict tells of all failures"
        return sum(each.size_bytes for each in written.sums.values())

    def _write(self) -> _Written:
        if not self.parts:
            return _Written({}, {})
        name = file_of(self.rank)
        placed, file_sum = write_file(
            partial_of(self.folder) / name, lambda stream: write_parts(stream, name, self.parts)
        )
        return _Written(placed, {name: file_sum})

    def _complete(self) -> None:
        """Make the files of all ranks a checkpoint, on rank 0, or remove them."""
        names = [str(rank) for rank in range(dist.get_world_size())]
        answers = [pickle.loads(each) for each in self.mailbox.collect(names, _PEERS_SECONDS)]
        self.mailbox.remove(names)
        partial = partial_of(self.folder)
        try:
            for rank, answer in enumerate(answers):
                if isinstance(answer, _Failure):
                    text = f"{self.folder}: not saved: rank {rank}: {answer.text}"
                    raise UserError(text) if answer.is_users else RuntimeError(text)
            self._add_rest(partial, answers)
            put_in_place(self.folder)
        except Exception:
            # Every rank has ended its part, and what stays would keep a full disk full.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        prune(self.folder.parent, self.run.training.checkpoint, kept_too=self.contents.best)

    def _add_rest(self, partial: Path, answers: list[_Written]) -> None:
        sums = {name: each for answer in answers for name, each in answer.sums.items()}
        metadata = self.plan.metadata(answer.placed for answer in answers)
        sums[METADATA] = write_file(partial / METADATA, lambda stream: stream.write(metadata))[1]
        for name, text in {CONFIG: CONFIG_TEXT, **self.contents.texts}.items():
            sums[name] = write_text(partial / name, text)
        carry_on(self.run.folder, partial)
        write_manifest(partial, sums)


def _make_folder(folder: Path) -> str:
    remove_leftovers(folder.parent)
    partial_of(folder).mkdir(parents=True)
    return f"save {secrets.token_hex(8)}"


def _attempt[Result](work: Callable[[], Result]) -> Result | _Failure:
    """Return the result of some work, or why it failed, for ranks that wait for it."""
    try:
        return work()
    except UserError as error:
        return _Failure(str(error), is_users=True)
    except OSError as error:
        return _Failure(
            f"a checkpoint cannot be written: {error}; free space or correct the folder, and go "
            "on from the last checkpoint with --resume auto",
            is_users=True,
        )
    except Exception:
        return _Failure(traceback.format_exc(), is_users=False)
