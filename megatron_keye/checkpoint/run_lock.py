# SPDX-License-Identifier: Apache-2.0
"""The lock of a run's folder, so that two runs never read, rename and write there at once.

run.lock names its holder; the time of its last change is the holder's last sign of life, since
locks of the kernel do not reach across all file systems that nodes share.
"""

import atexit
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from megatron_keye.checkpoint import queue_job
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.lock import locked

LOCK = "run.lock"
_BEAT_SECONDS = 15.0
LOST_AFTER_SECONDS = 300.0
"""A holder of another machine that gives no sign of life for so long is lost."""
LOST_AFTER_SECONDS_IN_JOB = 3 * _BEAT_SECONDS
"""The same within one job of a queue, which never runs twice at once."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock."""

    host: str
    """Name of its machine."""
    machine: str
    """Which start of that machine, and which space of process numbers."""
    process: int
    """Number of its process."""
    process_started: str
    """When that began, in the kernel's count, since numbers are used again."""
    since: str
    """Local time since when it has been held."""
    job: str
    """Its training.checkpoint.job."""
    token: str
    """What no other holder has."""

    def __str__(self) -> str:
        """Return who holds it since when, for a sentence."""
        job = f", job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"


class RunLock:
    """The lock of one folder; not held until `take`."""

    def __init__(self, folder: Path, job: str) -> None:
        """Take nothing yet.

        Args:
            folder: The run's folder.
            job: The run's training.checkpoint.job.
        """
        self._path = folder / LOCK
        self._mine = _this_process(job)
        self._is_held = False
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the lock, and keep it until `release` or the end of the process.

        A lock of this machine is free when its process has ended, one of another machine when its
        job has ended or when it gave no sign of life for LOST_AFTER_SECONDS.

        Raises:
            UserError: When another run holds it.
        """
        # Where a file system can't lock, two that start within milliseconds both pass here, and
        # one of them ends at `check`.
        with locked(self._path, "exclusive", needs_lock=False):
            holder = _read(self._path)
            if holder is not None:
                self._await_end(holder)
            self._path.write_text(json.dumps(asdict(self._mine)) + "\n")
        if not self._is_held:
            self._is_held = True
            atexit.register(self.release)
            threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def take_again(self, aside: Path) -> None:
        """Take the lock of a new folder after the old one was renamed.

        Args:
            aside: The old folder's new name.

        Raises:
            UserError: When another run has begun in between.
        """
        (aside / LOCK).unlink(missing_ok=True)
        self.take()

    def check(self) -> None:
        """Raise a UserError if another run has taken the lock, or someone has removed it."""
        if not self._is_held:
            return
        holder = _read(self._path)
        if holder != self._mine:
            raise UserError(
                f"{self._path}: is held by {holder or 'nobody'}, expected this run, process "
                f"{self._mine.process} on {self._mine.host}; it ends without saving, so that two "
                "runs do not mix; continue the one that you want with --resume auto"
            )

    def release(self) -> None:
        """Let go of the lock, if it is held by this process."""
        self._ended.set()
        if not self._is_held or self._mine.process != os.getpid():
            return
        self._is_held = False
        with suppress(OSError):
            if _read(self._path) == self._mine:
                with locked(self._path, "exclusive", needs_lock=False):
                    self._path.unlink()
                self._path.parent.rmdir()  # where nothing was written

    def _await_end(self, holder: Holder) -> None:
        """Return when a holder is gone, at once unless it may be an earlier start of this job."""
        if holder.machine == self._mine.machine:
            if _is_alive(holder) and not self._is_this_process(holder):
                raise self._refusal(holder, "")
            return
        is_running = queue_job.is_running(holder.job, asked_by=self._mine.job)
        if is_running is False:
            return
        is_own_job = bool(holder.job) and holder.job == self._mine.job
        limit = LOST_AFTER_SECONDS_IN_JOB if is_own_job else LOST_AFTER_SECONDS
        first_beat = self._path.stat().st_mtime
        while (age := self._age_seconds()) < limit:
            if not is_own_job or self._path.stat().st_mtime != first_beat:
                life = f", last sign of life {age:.0f} s ago"
                raise self._refusal(holder, life)
            time.sleep(_POLL_SECONDS)

    def _is_this_process(self, holder: Holder) -> bool:
        mine = (self._mine.process, self._mine.process_started)
        return (holder.process, holder.process_started) == mine

    def _refusal(self, holder: Holder, life: str) -> UserError:
        lost = (
            f"; if it is lost, its lock ends {LOST_AFTER_SECONDS / 60:.0f} minutes after that"
            if life
            else ""
        )
        return UserError(
            f"{self._path.parent}: is in use by {holder}{life}, expected no other run in this "
            "folder; wait for its end, stop it, or give this run another name with "
            f"--set name=...{lost}"
        )

    def _age_seconds(self) -> float:
        """Return the time since the holder's last sign of life, by the file system's clock."""
        probe = self._path.with_name(f"{LOCK}.{self._mine.token}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self._path.stat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with suppress(OSError):
                if _read(self._path) == self._mine:
                    os.utime(self._path)


def hold_run_folder(run: RunConfig, rank: int) -> RunLock:
    """Return the lock of the run's folder, which rank 0 holds. Collective: all ranks must call it.

    Raises:
        UserError: On all ranks, when another run is in the folder, or it cannot be written to.
    """
    lock, refusal = RunLock(run.folder, run.training.checkpoint.job), [""]
    if rank == 0:
        try:
            lock.take()
        except UserError as error:
            refusal = [str(error)]
        except OSError as error:
            refusal = [
                f"output_dir: got {run.output_dir!r}, where {run.folder / LOCK} cannot be written "
                f"({error.strerror}), expected a folder that this user may write to"
            ]
    dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise UserError(refusal[0])
    return lock


def _read(path: Path) -> Holder | None:
    """Return the holder that a lock names; None for an empty or half-written one."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _this_process(job: str) -> Holder:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    process = os.getpid()
    return Holder(
        host=socket.gethostname(),
        machine=f"{boot} {os.readlink('/proc/self/ns/pid')}",
        process=process,
        process_started=_started(process),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        job=job,
        token=secrets.token_hex(8),
    )


def _is_alive(holder: Holder) -> bool:
    return _started(holder.process) == holder.process_started


def _started(process: int) -> str:
    """Return when a process began, in clock ticks since the start of the machine; "" if ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # Behind the name, which may contain anything: state, then 18 other fields, then the start.
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
