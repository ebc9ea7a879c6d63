"""A rank that dies or stands still ends the whole job, and is named; so does a wish to stop."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_END = 20
"""From the death to the launcher's exit: it looks ten times per second and grants the other ranks
ten seconds to end by themselves."""


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """Return the launcher's ranks; a process that has just started has no variables yet."""
    found = {}
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return found


def start(folder: Path, *changes: str, **environment: str) -> subprocess.Popen[str]:
    """Start a decoder rank and a vision rank for a long run."""
    settings = [f"output_dir={folder}", "device=cpu", "training.steps=1000", *changes]
    command = ["bash", str(ROOT / "launch/local.sh"), "--ranks", "2", "keye_tiny"]
    command += [part for setting in settings for part in ("--set", setting)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1], ids=["vision rank"])
def test_a_killed_rank_ends_the_job(victim: int, tmp_path: Path) -> None:
    process = start(tmp_path, "training.checkpoint.interval_steps=1")
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout)
        ranks = ranks_of(process.pid)
        died = time.monotonic()
        ranks[victim].send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=3 * SECONDS_TO_END)
        assert time.monotonic() - died < SECONDS_TO_END
    finally:
        process.terminate()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 128 + signal.SIGKILL
    # The survivor says nothing.
    (told,) = [line for line in errors.splitlines() if not line.startswith("INFO:")]
    pid = ranks[victim].pid
    assert told.startswith(f"megatron-keye train: process {pid} was ended by signal 9"), errors
    where = r"rank 1 \(vision 0 of 1\) on .*: step 3, .*; --resume auto goes on after step [12]"
    assert re.search(where, told), errors
    assert not any(child.is_running() for child in ranks.values())


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_within_the_limit_and_is_named(tmp_path: Path) -> None:
    limit_seconds = 12.0
    setting = f"training.hang_minutes={limit_seconds / 60}"
    process = start(tmp_path, setting, "training.checkpoint.interval_steps=1")
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout)
        ranks = ranks_of(process.pid)
        stopped = time.monotonic()
        ranks[0].send_signal(signal.SIGSTOP)  # It hosts the store of all heartbeats too.
        _, errors = process.communicate(timeout=limit_seconds + 3 * SECONDS_TO_END)
        assert time.monotonic() - stopped < limit_seconds + SECONDS_TO_END
    finally:
        process.kill()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 4, errors
    told = [line.strip() for line in errors.splitlines() if not line.startswith("INFO:")]
    assert told[0] == "error: no progress for 0.2 min (training.hang_minutes), so the run ends"
    suspect = rf"suspect: rank 0 \(decoder stage 0\) on .*, process {ranks[0].pid}: step \d, .*"
    assert re.fullmatch(f"{suspect}; its process was stopped .*", told[1]), errors
    assert re.fullmatch(r"rank 1 \(vision 0 of 1\) on .*: step 3, .*", told[2]), errors
    assert len(told) == 5 and re.fullmatch(r"--resume auto goes on after step [12]", told[4])
    (stack,) = (tmp_path / "keye_tiny" / "hangs").glob("step-3/rank-1.txt")
    assert "take_gradients" in stack.read_text()
    assert not any(child.is_running() for child in ranks.values())


@pytest.mark.slow
def test_a_rank_that_is_ended_in_its_start_is_named(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        deadline = time.monotonic() + SECONDS_TO_END
        # Until it handles the signal, which then is no error but an end like by any other program.
        while not (ranks := ranks_of(process.pid)) or not handles_term(ranks.get(1)):
            assert time.monotonic() < deadline
        ranks[1].send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=3 * SECONDS_TO_END)
    finally:
        process.kill()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 1
    assert f"process {ranks[1].pid} was ended by signal 15 (SIGTERM): rank 1" in errors
    assert "before the first step, start; --resume auto" in errors and "Traceback" not in errors


def handles_term(process: psutil.Process | None) -> bool:
    """Return whether a process has a handler for TERM."""
    if process is None:
        return False
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_rank", "status"),
    [(signal.SIGUSR1, 1, 75), (signal.SIGTERM, None, 143)],
    ids=["USR1 to one rank", "TERM to the launcher"],
)
def test_a_signal_stops_all_ranks_after_the_same_step_which_is_saved(
    number: signal.Signals, to_rank: int | None, status: int, tmp_path: Path
) -> None:
    process = start(tmp_path)
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 1/") for line in process.stdout)
        ranks = ranks_of(process.pid)
        asked = process if to_rank is None else ranks[to_rank]
        asked.send_signal(number)
        output, errors = process.communicate(timeout=3 * SECONDS_TO_END)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    stopped = re.findall(r"stopped after step (\d+) of 1000 by", output)
    folder = tmp_path / "keye_tiny" / "checkpoints"
    assert os.listdir(folder) == [f"step-{int(stopped[0]):08d}"]
    assert not any(child.is_running() for child in ranks.values())


FAULT = """
import os
if os.environ.get("RANK") == "{rank}":
    from {module} import {owner}
    working = {owner}.{method}
    def failing(self, *arguments, **more):
        failing.calls += 1
        if failing.calls > {calls}:
            raise RuntimeError("a deliberate fault")
        return working(self, *arguments, **more)
    failing.calls = 0
    {owner}.{method} = failing
"""
"""Python imports it at its start, as sitecustomize."""
DECODER = {"rank": 0, "module": "megatron_keye.training.decoder_pass", "owner": "DecoderPass"}
VISION = {"rank": 1, "module": "megatron_keye.training.chunk_encoder", "owner": "ChunkEncoder"}
FAULTS = {
    "decoder rank": DECODER | {"method": "_features", "calls": 3},
    "vision rank": VISION | {"method": "backward", "calls": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_rank_that_raises_ends_the_job_with_its_error(
    fault: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(**fault))
    process = start(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 1/") for line in process.stdout)
        passed = time.monotonic()
        _, errors = process.communicate(timeout=3 * SECONDS_TO_END)
        # The fault comes within the second or third step.
        assert time.monotonic() - passed < 2 * SECONDS_TO_END
    finally:
        process.terminate()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 1
    assert errors.count("Traceback") == 1, errors
    assert "RuntimeError: a deliberate fault" in errors
    told, trace = errors.index(f"error: rank {fault['rank']} ("), errors.index("Traceback")
    assert told < trace and "failed: step" in errors[told:trace]
