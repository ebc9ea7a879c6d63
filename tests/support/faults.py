# SPDX-License-Identifier: Apache-2.0
"""Jobs of two ranks in which one is killed, stopped or poisoned; the same with gloo and NCCL."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_END = 20
"""From a death to the launcher's exit: it looks ten times per second and grants the other ranks
ten seconds to end by themselves."""
ROLES = (r"rank 0 \(decoder stage 0\) on \S+", r"rank 1 \(vision 0 of 1\) on \S+")
GO_ON = r"--resume auto goes on after step \d+"
FAULT = """
import os
if os.environ.get("RANK") == "{rank}":
    from {module} import {owner}
    working = {owner}.{method}
    def failing(self, *arguments, **more):
        failing.calls += 1
        if failing.calls > {calls}:
            {fault}
        return working(self, *arguments, **more)
    failing.calls = 0
    {owner}.{method} = failing
"""
"""Python imports it at its start, as sitecustomize."""


def start(
    folder: Path,
    *changes: str,
    device: str = "cpu",
    errors: int | TextIO = subprocess.PIPE,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start a decoder rank and a vision rank for a long run.

    Args:
        folder: Where it writes to.
        changes: Settings to change.
        device: "cpu" for gloo, "cuda" for NCCL.
        errors: Where its errors go.
        environment: Variables of the ranks.
    """
    settings = [f"output_dir={folder}", f"device={device}", "training.steps=1000", *changes]
    command = ["bash", str(ROOT / "launch/local.sh"), "--ranks", "2", "keye_tiny"]
    command += [part for setting in settings for part in ("--set", setting)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


@contextmanager
def training(
    folder: Path, *changes: str, device: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a job that saves each step, wait for its second step, and end it afterwards.

    Its errors go to a file, since processes that outlive a killed rank would hold a pipe open.
    """
    saving = "training.checkpoint.interval_steps=1"
    with (folder / "errors.txt").open("w") as errors:
        process = start(folder, saving, *changes, device=device, errors=errors, **environment)
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout), errors_of(folder)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=2 * SECONDS_TO_END)


def wait_for_checkpoint(folder: Path) -> None:
    """Wait until a checkpoint is complete, since it is written while training goes on."""
    deadline = time.monotonic() + SECONDS_TO_END
    while not list(folder.glob("step-????????")):
        assert time.monotonic() < deadline, "nothing is saved"
        time.sleep(0.05)


def errors_of(folder: Path) -> str:
    """Return what a job of `training` has written to standard error."""
    return (folder / "errors.txt").read_text()


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """Return the launcher's ranks; a process that has just started has no variables yet."""
    found = {}
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return found


def check_killed(
    victim: int, folder: Path, device: str, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Kill a rank: the job ends at once, one line tells of it, and nothing is left behind."""
    files, shared_memory = folder / "tmp", set(os.listdir("/dev/shm"))
    files.mkdir()
    with training(folder, device=device, TMPDIR=str(files)) as process:
        meanwhile()
        wait_for_checkpoint(folder / "keye_tiny" / "checkpoints")
        ranks, others = ranks_of(process.pid), psutil.Process(process.pid).children(recursive=True)
        died = time.monotonic()
        ranks[victim].send_signal(signal.SIGKILL)
        process.wait(timeout=3 * SECONDS_TO_END)
        assert time.monotonic() - died < SECONDS_TO_END
    _, alive = psutil.wait_procs(others, timeout=SECONDS_TO_END)
    assert not [other for other in alive if other.status() != psutil.STATUS_ZOMBIE]
    assert not list(files.rglob("pymp-*"))
    assert set(os.listdir("/dev/shm")) <= shared_memory
    errors = errors_of(folder)
    assert process.returncode == 128 + signal.SIGKILL
    (told,) = told_in(errors)
    pid = ranks[victim].pid
    assert told.startswith(f"megatron-keye train: process {pid} was ended by signal 9"), errors
    assert re.search(rf"{ROLES[victim]}: step \d+(, .*)?; {GO_ON}$", told), errors
    assert not any(child.is_running() for child in ranks.values())


def check_stopped(victim: int, folder: Path, device: str, *, limit_seconds: float) -> None:
    """Stop a rank: the job ends within the limit, and the report names it and shows stacks."""
    setting = f"training.hang_minutes={limit_seconds / 60}"
    with training(folder, setting, device=device) as process:
        wait_for_checkpoint(folder / "keye_tiny" / "checkpoints")
        ranks, stopped = ranks_of(process.pid), time.monotonic()
        ranks[victim].send_signal(signal.SIGSTOP)
        process.wait(timeout=limit_seconds + 4 * SECONDS_TO_END)
        # Stacks, the others' judgement, and the launcher's grace for the stopped rank.
        assert time.monotonic() - stopped < limit_seconds + 2 * SECONDS_TO_END
    errors = errors_of(folder)
    assert process.returncode == 4, errors
    told = told_in(errors)
    assert re.fullmatch(r"error: no progress for \S+ min \(training.hang_minutes\), .*", told[0])
    where = r"step \d(, .*)?"
    suspect = f"suspect: {ROLES[victim]}, process {ranks[victim].pid}: {where}; its process was"
    assert re.match(rf"{suspect} stopped", told[1]), errors
    assert re.fullmatch(f"{ROLES[1 - victim]}: {where}", told[2]), errors
    assert len(told) == 5 and re.fullmatch(GO_ON, told[4]), errors
    (stack,) = (folder / "keye_tiny" / "hangs").glob(f"step-[23]/rank-{1 - victim}.txt")
    assert "training/trainer.py" in stack.read_text()
    assert not any(child.is_running() for child in ranks.values())


def check_poisoned(victim: int, folder: Path, device: str) -> None:
    """Make each gradient of a rank NaN: the job ends with one sentence, and nobody hangs."""
    fault = {"module": "megatron_keye.optim.optimizer", "owner": "JointOptimizer"}
    fault |= {"method": "finish_gradients", "fault": "arguments = (float('nan'),)"}
    (folder / "sitecustomize.py").write_text(FAULT.format(rank=victim, calls=2, **fault))
    changes = ("training.health.max_bad_steps=2",)
    path = ":".join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    with training(folder, *changes, device=device, PYTHONPATH=path) as process:
        process.wait(timeout=6 * SECONDS_TO_END)
    errors = errors_of(folder)
    assert process.returncode == 2, errors
    told = told_in(errors)
    assert sum(line.startswith("error: ") for line in told) == 1, errors
    assert any(re.match(f"({'|'.join(ROLES)}): step [45]", line) for line in told), errors


def told_in(errors: str) -> list[str]:
    """Return the lines of an error output but those of the log, which hold nothing internal."""
    for internal in ("Traceback", "frame #", "terminate called", "c10::", "[W", "[E"):
        assert internal not in errors, errors
    log = ("INFO:", "WARNING:")
    return [line.strip() for line in errors.splitlines() if not line.startswith(log)]
