# SPDX-License-Identifier: Apache-2.0
"""Each failure is told once: by the rank that failed, or by the first that lost another."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, FileStore

from megatron_keye.cli import failure
from megatron_keye.cli.failure import end_failed
from megatron_keye.cli.shared_heartbeats import open_slot, shared_heartbeats
from megatron_keye.cli.status import FAILED, LOST_PEERS, USER_ERROR
from megatron_keye.errors import UserError
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.watchdog import Watchdog
from megatron_keye.parallel.heartbeat_board import HeartbeatBoard
from megatron_keye.parallel.process import Process

GLOO = RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
ANEW = "no checkpoint was saved, so the run begins anew"
ROLES = ["decoder stage 0", "decoder stage 1", "vision 0 of 1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECONDS_FOR_THE_FIRST", "_SECONDS_TO_BE_HEARD"):
        monkeypatch.setattr(failure, name, 0.0)
    monkeypatch.setattr(failure, "_SECONDS_TO_FIND", 1.0)


@pytest.fixture
def lost() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


class Job:
    """Three ranks of this process, with one store."""

    def __init__(self, folder: Path) -> None:
        self.ranks: list[tuple[Process, Watchdog]] = []
        for rank, role in enumerate(ROLES):
            beat = Heartbeat(rank=rank, role=role, host="node", folder=str(folder))
            beat.begin_step(6)
            process = Process(
                rank=rank,
                num_ranks=len(ROLES),
                device=torch.device("cpu"),
                store=FileStore(str(folder / "store"), len(ROLES)),
                heartbeat=beat,
            )
            board = HeartbeatBoard(process)
            watchdog: Any = Watchdog(
                beat,
                board,
                roles=ROLES,
                limit_seconds=600.0,
                folder=folder,
                tell=str,
                end=lambda: None,
            )
            board.post(beat.to_text())
            self.ranks.append((process, watchdog))

    def end(self, rank: int, error: Exception) -> int:
        return end_failed(error, *self.ranks[rank])

    def run_as(self, rank: int, pid: int) -> None:
        process, _ = self.ranks[rank]
        process.heartbeat.pid = pid
        HeartbeatBoard(process).post(process.heartbeat.to_text())


def test_an_error_of_the_program_is_told_once_with_rank_step_and_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    job.ranks[2][0].heartbeat.note("encode", "chunk 1")
    try:
        raise IndexError("beyond the end")
    except IndexError as error:
        assert job.end(2, error) == FAILED
    assert job.end(1, IndexError("beyond the end")) == LOST_PEERS
    assert job.end(0, GLOO) == LOST_PEERS
    first, *trace = capsys.readouterr().err.splitlines()
    assert first == (
        f"error: rank 2 (vision 0 of 1) on node failed: step 6, encode chunk 1; {ANEW}"
    )
    assert trace[0].startswith("Traceback") and trace[-1] == "IndexError: beyond the end"
    assert len([line for line in trace if "Traceback" in line]) == 1


def test_an_error_of_the_user_has_no_traceback_and_says_where_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    assert job.end(1, UserError("a.mp4: is cut")) == USER_ERROR
    assert capsys.readouterr().err.splitlines() == [
        "error: a.mp4: is cut",
        f"rank 1 (decoder stage 1) on node: step 6; {ANEW}",
    ]


@pytest.mark.parametrize("error", [GLOO, DistBackendError("remote process exited")])
def test_a_rank_that_was_killed_is_told_by_the_first_that_noticed(
    error: Exception,
    lost: subprocess.Popen[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job(tmp_path)
    job.run_as(2, lost.pid)
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    assert [job.end(rank, error) for rank in (1, 0)] == [LOST_PEERS] * 2
    assert capsys.readouterr().err == (
        f"error: rank 2 (vision 0 of 1) on node, process {lost.pid}, was lost, last heard of: "
        f"step 6; rank 1 (decoder stage 1) on node noticed: step 6; {ANEW}\n"
    )


def test_a_store_that_ended_with_rank_0_is_told_by_the_first_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: object) -> Any:
        raise RuntimeError("Broken pipe")

    job = Job(tmp_path)
    for _, watchdog in job.ranks:
        watchdog.hear()
    monkeypatch.setattr(HeartbeatBoard, "read", gone)
    monkeypatch.setattr(Process, "claim_failure", gone)
    assert [job.end(rank, GLOO) for rank in (2, 1)] == [LOST_PEERS] * 2
    told = capsys.readouterr().err
    assert told.startswith("error: rank 0 (decoder stage 0) on node") and told.count("error") == 1
    assert "rank 1 (decoder stage 1) on node noticed" in told
    job.ranks[1][1].is_reported = True
    assert job.end(1, GLOO) == LOST_PEERS and not capsys.readouterr().err, "rank 0 told why"


def test_under_our_launcher_which_tells_of_a_killed_rank_survivors_are_silent(
    lost: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    with shared_heartbeats():
        leave = open_slot(2)
        assert leave is not None
        leave(Heartbeat(rank=2, pid=lost.pid))
        lost.kill()
        time.sleep(0.1)
        assert job.end(0, GLOO) == LOST_PEERS
    assert not capsys.readouterr().err


def test_an_exchange_that_fails_with_all_ranks_present_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    outer = ValueError("while it saved")
    outer.__cause__ = GLOO
    assert job.end(1, outer) == LOST_PEERS
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank 1 (decoder stage 1) on node: step 6" in line and "none of them is missing" in line
