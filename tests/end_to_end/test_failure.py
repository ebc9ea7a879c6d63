"""A rank that dies ends the whole job soon, whoever waits for it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_END = 20
"""From the death to the launcher's exit: it looks five times a second and grants the other ranks
ten seconds to end by themselves."""


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """Return the launcher's ranks; it also has a short-lived `sleep`."""
    found = {}
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1], ids=["vision rank"])
def test_a_killed_rank_ends_the_job(victim: int, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "device=cpu", "training.steps=1000"]
    command = ["bash", str(ROOT / "launch/local.sh"), "--ranks", "2", "keye_tiny"]
    command += [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 1/") for line in process.stdout)
        ranks = ranks_of(process.pid)
        died = time.monotonic()
        ranks[victim].send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=3 * SECONDS_TO_END)
        assert time.monotonic() - died < SECONDS_TO_END
    finally:
        process.terminate()
        process.wait(timeout=SECONDS_TO_END)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"process {ranks[victim].pid} was ended by signal 9" in errors
    assert not any(child.is_running() for child in ranks.values())
