# SPDX-License-Identifier: Apache-2.0
"""The launcher knows where a rank was that a signal ended, whatever else the rank could not do."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_keye.cli.local import launch
from megatron_keye.cli.shared_heartbeats import (
    describe_end,
    open_slot,
    read_heartbeats,
    shared_heartbeats,
)
from megatron_keye.observe.heartbeat import Heartbeat

RANK = """
import os, signal
from megatron_keye.cli.rank import end_by_signal
from megatron_keye.cli.shared_heartbeats import open_slot
from megatron_keye.observe.heartbeat import Heartbeat
rank = int(os.environ["RANK"])
beat = Heartbeat(rank=rank, role="vision 0 of 1", host="node7", publish=open_slot(rank))
beat.note("start")
signal.signal(signal.SIGTERM, lambda number, frame: end_by_signal(number, beat))
if rank == 1:
    beat.begin_step(8)
    beat.note("encode", "chunk 3")
    os.kill(os.getpid(), {number})
signal.pause()
"""


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [(signal.SIGKILL, 137, "SIGKILL, as the kernel does where memory runs out"),
     (signal.SIGSEGV, 139, "SIGSEGV"),
     (signal.SIGTERM, 1, "SIGTERM")],
)  # fmt: skip
def test_a_rank_that_a_signal_ends_is_told_with_role_step_and_work(
    number: int, status: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with shared_heartbeats():
        command = [sys.executable, "-c", RANK.format(number=int(number))]
        assert launch(command, 2, failure_grace_seconds=20.0) == status
        (pid,) = [beat.pid for beat in read_heartbeats() if beat.rank == 1]
    assert capfd.readouterr().err == (
        f"megatron-keye train: process {pid} was ended by signal {int(number)} ({name}): rank 1 "
        "(vision 0 of 1) on node7: step 8, encode chunk 3; --resume auto goes on after the last "
        "checkpoint, if there is one\n"
    )


def test_memory_is_shared_by_all_ranks_and_leaves_nothing() -> None:
    assert open_slot(0) is None and read_heartbeats() == []
    before = set(os.listdir("/proc/self/fd"))
    with shared_heartbeats():
        for rank in (2, 0):
            leave = open_slot(rank)
            assert leave is not None
            leave(Heartbeat(rank=rank, work="a long name"))
            leave(Heartbeat(rank=rank, work="save"))
        left = [(beat.rank, beat.work) for beat in read_heartbeats()]
        assert left == [(0, "save"), (2, "save")]
        code = "from megatron_keye.cli.shared_heartbeats import *; print(len(read_heartbeats()))"
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "2\n"
    assert open_slot(0) is None
    opened = set(os.listdir("/proc/self/fd")) - before
    assert len(opened) <= 2, "the slots that this process opened as a rank, until it ends"


def test_a_rank_that_ended_by_itself_has_told_why() -> None:
    with shared_heartbeats():
        leave = open_slot(0)
        assert leave is not None
        leave(Heartbeat(rank=0))
        assert describe_end(os.getpid(), 0) == ""
    assert describe_end(17, 9) == "process 17 was ended by signal 9"
