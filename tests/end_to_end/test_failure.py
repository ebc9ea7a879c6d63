"""A rank that dies ends the whole job soon, whoever waits for it; so does a wish to stop."""

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


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Start a decoder rank and a vision rank for a long run."""
    settings = [f"output_dir={folder}", "device=cpu", "training.steps=1000", *more]
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
def test_a_second_run_is_refused_and_a_killed_rank_ends_the_first_without_leftovers(
    tmp_path: Path,
) -> None:
    victim, saves = 1, "training.checkpoint.interval_steps=1"
    files, shared_memory = tmp_path / "tmp", set(os.listdir("/dev/shm"))
    files.mkdir()
    process = start(tmp_path, saves, TMPDIR=str(files))
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout)
        check_refused(start(tmp_path))
        ranks, others = ranks_of(process.pid), psutil.Process(process.pid).children(recursive=True)
        died = time.monotonic()
        ranks[victim].send_signal(signal.SIGKILL)
        # Ends when nothing is left that could write.
        _, errors = process.communicate(timeout=3 * SECONDS_TO_END)
        assert time.monotonic() - died < SECONDS_TO_END
    finally:
        process.terminate()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"process {ranks[victim].pid} was ended by signal 9" in errors
    _, alive = psutil.wait_procs(others, timeout=SECONDS_TO_END)
    assert not [other for other in alive if other.status() != psutil.STATUS_ZOMBIE]
    assert not list(files.rglob("pymp-*"))
    assert set(os.listdir("/dev/shm")) <= shared_memory
    assert (tmp_path / "keye_tiny" / "checkpoints").exists(), "the second run has renamed it"


def check_refused(second: subprocess.Popen[str]) -> None:
    """Check that a run ends with one sentence, since another one is in its folder."""
    _, errors = second.communicate(timeout=3 * SECONDS_TO_END)
    assert second.returncode == 2
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "/keye_tiny: is in use by process" in sentence
    assert "Traceback" not in errors


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
