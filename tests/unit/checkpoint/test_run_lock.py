# SPDX-License-Identifier: Apache-2.0
"""One run is in a folder at a time; the lock of a lost one is free, that of a living one never."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.checkpoint import run_lock
from megatron_keye.checkpoint.run_lock import LOCK, LOST_AFTER_SECONDS, Holder, RunLock
from megatron_keye.errors import UserError

HOLDS = """
import sys, time
from pathlib import Path
from megatron_keye.checkpoint.run_lock import RunLock
RunLock(Path(sys.argv[1]), "").take()
print("holds", flush=True)
if sys.stdin.readline():
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock of a folder, until a line comes or its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_has_ended(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    lock = RunLock(tmp_path, "")
    says = rf"is in use by process {other.pid} on .*, since 2\d+-.*, expected no other run .*name="
    with pytest.raises(UserError, match=says) as refusal:
        lock.take()
    assert "\n" not in str(refusal.value)
    other.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.raises(UserError, match="is in use by"):
        lock.take()
    other.kill()
    other.wait()
    assert (tmp_path / LOCK).exists(), "a killed process cannot let go"
    lock.take()
    lock.check()
    lock.release()
    lock.check()


def test_the_end_of_a_process_lets_go(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.communicate()
    assert other.returncode == 0 and not tmp_path.exists()


def held_by(folder: Path, age_seconds: float, **changed: Any) -> Holder:
    """Write a lock as another holder would have left it."""
    holder = replace(run_lock._this_process(""), token="theirs", **changed)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    os.utime(folder / LOCK, (time.time() - age_seconds,) * 2)
    return holder


def test_a_process_number_that_is_used_again_holds_nothing(tmp_path: Path) -> None:
    held_by(tmp_path, 0, process=os.getppid(), process_started="1")
    RunLock(tmp_path, "").take()


def test_another_machine_is_lost_after_its_last_sign_of_life(tmp_path: Path) -> None:
    elsewhere = {"host": "node7", "machine": "another boot"}
    held_by(tmp_path, LOST_AFTER_SECONDS - 60, **elsewhere)
    lock = RunLock(tmp_path, "")
    with pytest.raises(UserError, match=r"on node7, .* last sign of life 2\d\d s ago.*5 minutes"):
        lock.take()
    held_by(tmp_path, LOST_AFTER_SECONDS + 1, **elsewhere)
    lock.take()
    assert sorted(os.listdir(tmp_path)) == [LOCK]


def test_a_lock_that_another_run_took_ends_the_first_at_its_save(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "")
    lock.take()
    held_by(tmp_path, 0, host="node7", machine="another boot")
    with pytest.raises(UserError, match=r"is held by process \d+ on node7.*ends without saving"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists(), "it was the other's"


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path, "")
    lock.take()
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.release()


SQUEUE = """#!/bin/sh
case "$*" in
  *--jobs=6*) echo RUNNING ;;
  *--jobs=5*) echo PENDING ;;
  *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""
"""Answers as Slurm does."""


@pytest.mark.parametrize(
    ("job", "is_free"),
    [("slurm-a-6", False), ("slurm-a-5", True), ("slurm-a-4", True), ("slurm-b-4", False)],
    ids=["running", "waiting again", "forgotten", "of another cluster"],
)
def test_slurm_knows_whether_the_holder_of_another_machine_runs(
    job: str, is_free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    held_by(tmp_path, 10, host="node7", machine="another boot", job=job)
    lock = RunLock(tmp_path, "slurm-a-7")
    if is_free:
        lock.take()
        return
    with pytest.raises(UserError, match=f"on node7, job {job}, since"):
        lock.take()


def test_an_earlier_start_of_the_same_job_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LOST_AFTER_SECONDS_IN_JOB", 11.0)
    held_by(tmp_path, 10, host="node7", machine="another boot", job="slurm-a-7")
    began = time.monotonic()
    RunLock(tmp_path, "slurm-a-7").take()
    assert time.monotonic() - began > 0.5
