# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or stands still ends the whole job, and is named; so does a wish to stop."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.faults import (
    FAULT,
    ROOT,
    SECONDS_TO_END,
    check_killed,
    check_stopped,
    ranks_of,
    start,
)


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_rank_ends_the_first(tmp_path: Path) -> None:
    check_killed(1, tmp_path, "cpu", meanwhile=lambda: check_refused(start(tmp_path)))
    assert (tmp_path / "keye_tiny" / "checkpoints").exists(), "the second run has renamed it"


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_within_the_limit(tmp_path: Path) -> None:
    # Rank 0 hosts the store of all heartbeats.
    check_stopped(0, tmp_path, "cpu", limit_seconds=12.0)


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
    assert process.returncode == 1, errors
    assert f"process {ranks[1].pid} was ended by signal 15 (SIGTERM): rank 1" in errors
    assert "before the first step, start; --resume auto" in errors and "Traceback" not in errors


def handles_term(process: psutil.Process | None) -> bool:
    """Return whether a process has a handler for TERM."""
    if process is None:
        return False
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


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


RAISES = {"fault": "raise RuntimeError('a deliberate fault')"}
DECODER = {"rank": 0, "module": "megatron_keye.training.decoder_pass", "owner": "DecoderPass"}
VISION = {"rank": 1, "module": "megatron_keye.training.chunk_encoder", "owner": "ChunkEncoder"}
FAULTS = {
    "decoder rank": DECODER | {"method": "_features", "calls": 3} | RAISES,
    "vision rank": VISION | {"method": "backward", "calls": 2} | RAISES,
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
    assert process.returncode == 1, errors
    assert errors.count("Traceback") == 1, errors
    assert "RuntimeError: a deliberate fault" in errors
    told, trace = errors.index(f"error: rank {fault['rank']} ("), errors.index("Traceback")
    assert told < trace and "failed: step" in errors[told:trace]
