# SPDX-License-Identifier: Apache-2.0
"""A run hangs when no rank progresses, and the rank that holds up all others is named."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.observe.hang import (
    SLOW_FACTOR,
    Peer,
    ProcessState,
    hang_report,
    is_hung,
    process_state,
    reporter,
    suspects,
)
from megatron_keye.observe.heartbeat import Heartbeat

LIMIT, SILENT = 600.0, 150.0


def peer(
    rank: int,
    still: float,
    *,
    silent: float = 1.0,
    state: ProcessState = "elsewhere",
    **fields: Any,
) -> Peer:
    beat = {"step": 9, "is_first_step": False, "work": "forward"} | fields
    return Peer(
        heartbeat=Heartbeat(rank=rank, **beat),
        still_seconds=still,
        silent_seconds=silent,
        state=state,
    )


HANGS = {
    "all stand still": ([700, 650], {}, True),
    "this one progresses": ([500, 9000], {}, False),
    "another one progresses": ([9000, 500], {}, False),
    "another one may be slow": ([9000, 700], {"work": "decode"}, False),
    "another one compiles": ([9000, 700], {"is_first_step": True}, False),
    "a slow work that is too long": ([9000, SLOW_FACTOR * 600], {"work": "decode"}, True),
    "another one is stopped in a slow work": ([700, 5], {"work": "save", "state": "stopped"}, 1),
    "another one is gone": ([700, 5], {"state": "gone"}, True),
    "another one is silent": ([700, 5], {"work": "save", "silent": 160}, True),
    "a lost rank does not end one that progresses": ([500, 5], {"state": "gone"}, False),
}


@pytest.mark.parametrize(("still", "other", "expected"), HANGS.values(), ids=HANGS)
def test_a_run_hangs_when_nobody_progresses_or_somebody_is_lost(
    still: list[float], other: dict[str, Any], expected: bool
) -> None:
    own, others = peer(0, still[0]), [peer(1, still[1], **other)]
    assert is_hung(own, others, limit_seconds=LIMIT, silent_limit=SILENT) == bool(expected)


def test_a_rank_alone_hangs_after_its_own_limit() -> None:
    for work, limit in (("forward", LIMIT), ("load", SLOW_FACTOR * LIMIT)):
        for still, expected in ((limit - 1, False), (limit, True)):
            own = peer(0, still, work=work)
            assert is_hung(own, [], limit_seconds=LIMIT, silent_limit=SILENT) == expected


WAITS = {"work": "wait", "exchange": "features of micro-batch 1"}
SUSPECTS = {
    "stopped before all else": ([{}, {"state": "stopped"}, {"step": 3}], [1], "was stopped"),
    "gone": ([{}, {"silent": 999}, {"state": "gone"}], [2], "is gone"),
    "silent": ([{}, {"silent": 999}, {"step": 3}], [1], "does not answer"),
    "a step behind": ([{}, WAITS, {"step": 8} | WAITS], [2], "later step"),
    "computes while others wait": ([WAITS, {}, WAITS], [1], "this one does not"),
    "longest": ([WAITS, WAITS | {"still": 999}, WAITS], [1], "for longest"),
}


@pytest.mark.parametrize(("ranks", "expected", "reason"), SUSPECTS.values(), ids=SUSPECTS)
def test_the_rank_that_holds_up_the_others_is_named(
    ranks: list[dict[str, Any]], expected: list[int], reason: str
) -> None:
    peers = [peer(rank, **({"still": 700.0} | fields)) for rank, fields in enumerate(ranks)]
    found, why = suspects(peers, silent_limit=SILENT)
    assert [each.heartbeat.rank for each in found] == expected
    assert reason in why


def test_the_first_rank_that_is_not_lost_reports() -> None:
    peers = [peer(0, 700, state="stopped"), peer(1, 700, silent=999), peer(2, 700), peer(3, 700)]
    assert reporter(peers, silent_limit=SILENT) == 2


def test_a_report_is_short_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    peers = [peer(rank, 700, **WAITS) for rank in range(512)]
    peers[300] = peer(300, 900, role="decoder stage 2", host="node37", pid=99, detail="row 1")
    text = hang_report(peers, limit_seconds=LIMIT, silent_limit=SILENT, folder=tmp_path)
    first, suspected, *others = text.splitlines()
    assert first == "error: no progress for 10 min (training.hang_minutes), so the run ends"
    assert suspected.strip() == (
        "suspect: rank 300 (decoder stage 2) on node37, process 99: step 9, forward row 1; "
        "others wait for an exchange, this one does not"
    )
    assert len(others) == 6 and str(tmp_path) in text and "--resume auto" in others[-1]


def test_the_state_of_a_process_is_that_of_the_kernel() -> None:
    process = subprocess.Popen(["sleep", "60"])
    beat = Heartbeat(pid=process.pid)
    try:
        assert process_state(beat, beat.pid_space) == "running"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert process_state(beat, beat.pid_space) == "stopped"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(beat, beat.pid_space) == "gone", "its parent has not waited for it"
    finally:
        process.kill()
        process.wait()
    assert process_state(beat, beat.pid_space) == "gone"
    assert process_state(beat, "another machine") == "elsewhere"
