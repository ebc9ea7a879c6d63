# SPDX-License-Identifier: Apache-2.0
"""The watchdog ends a run that hangs, once and with a reason, and no run that is only slow."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.watchdog import Watchdog

LIMIT = 0.6
"""Seconds; a beat is a twentieth."""
PATIENCE = 20.0
"""For a thread on a busy machine."""


class Memory:
    """A board of ranks in one process, which may be cut off."""

    def __init__(self, num_ranks: int) -> None:
        self.texts: dict[int, str] = {}
        self.num_ranks, self.claimed = num_ranks, False
        self.answers = threading.Event()
        self.answers.set()

    def of(self, rank: int) -> "MemoryBoard":
        return MemoryBoard(self, rank)


class MemoryBoard:
    def __init__(self, memory: Memory, rank: int) -> None:
        self._memory, self._rank = memory, rank

    def post(self, text: str) -> None:
        self._memory.answers.wait()
        self._memory.texts[self._rank] = text

    def read(self) -> Sequence[bytes]:
        self._memory.answers.wait()
        while len(self._memory.texts) < self._memory.num_ranks:
            time.sleep(0.01)
        return [self._memory.texts[rank].encode() for rank in range(self._memory.num_ranks)]

    def read_host(self) -> bytes:
        return self.read()[0]

    def is_reported(self) -> bool:
        return self._memory.claimed

    def claim_report(self) -> bool:
        self._memory.answers.wait()
        is_first, self._memory.claimed = not self._memory.claimed, True
        return is_first


class Ranks:
    """Watchdogs of some ranks, what they told and which of them ended."""

    def __init__(self, num_ranks: int, folder: Path, limit: float = LIMIT) -> None:
        self.memory, self.told, self.ended = Memory(num_ranks), list[str](), set[int]()
        self.beats = [Heartbeat(rank=rank) for rank in range(num_ranks)]
        roles = [f"stage {rank}" for rank in range(num_ranks)]
        self.watchdogs = []
        for beat in self.beats:
            beat.begin_step(3)
            beat.begin_step(4)
            watchdog = Watchdog(
                beat,
                self.memory.of(beat.rank),
                roles=roles,
                limit_seconds=limit,
                folder=folder,
                tell=self.told.append,
                end=lambda rank=beat.rank: self.ended.add(rank),
            )
            self.watchdogs.append(watchdog)

    def __enter__(self) -> "Ranks":
        for watchdog in self.watchdogs:
            watchdog.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.answers.set()
        for watchdog in self.watchdogs:
            watchdog.close()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_stands_still_ends_everywhere_and_is_told_once(tmp_path: Path) -> None:
    with Ranks(3, tmp_path) as ranks:
        for rank in (0, 2):
            ranks.beats[rank].note("wait", exchange="the sum of gradients")
        ranks.beats[1].note("backward", "micro-batch 5")
        until(lambda: len(ranks.ended) == 3)
    assert len(ranks.told) == 1, ranks.told
    assert re.search(r"suspect: rank 1 .*step 4, backward micro-batch 5; others", ranks.told[0])
    for rank in range(3):
        stack = (tmp_path / "step-4" / f"rank-{rank}.txt").read_text()
        assert stack.startswith(f"rank {rank} on ") and "in until" in stack, "this thread's stack"


def test_a_rank_that_progresses_or_may_be_slow_keeps_the_others_alive(tmp_path: Path) -> None:
    with Ranks(2, tmp_path) as ranks:
        ranks.beats[1].note("save")
        for _ in range(8):
            time.sleep(LIMIT / 4)
            ranks.beats[1].mark()
        time.sleep(1.5 * LIMIT)  # Without a mark, in work that may be slow.
        assert not ranks.told and not ranks.ended
        ranks.beats[1].note("forward")
        until(lambda: len(ranks.ended) == 2)


def test_a_store_that_does_not_answer_tells_of_the_rank_that_hosts_it(tmp_path: Path) -> None:
    with Ranks(2, tmp_path) as ranks:
        until(lambda: len(ranks.memory.texts) == 2)
        time.sleep(LIMIT / 4)
        for beat in ranks.beats:
            beat.mark()
        # The host as another rank sees it: of another machine, and silent.
        ranks.watchdogs[1]._peers[0].pid_space = "another machine"
        ranks.memory.answers.clear()
        until(lambda: 1 in ranks.ended)
    told = [text for text in ranks.told if "does not answer" in text]
    assert len(told) == 1 and "suspect: rank 0" in told[0], ranks.told


def test_without_a_limit_nothing_ends(tmp_path: Path) -> None:
    with Ranks(1, tmp_path, limit=float("inf")) as ranks:
        time.sleep(2 * LIMIT)
        assert not ranks.ended


def test_an_exchange_that_failed_on_the_device_ends_the_rank(tmp_path: Path) -> None:
    ranks, failed = Ranks(1, tmp_path, limit=LIMIT), list[str]()
    ranks.watchdogs[0]._find_error = lambda: "NCCL reports COMM_ERROR"
    ranks.watchdogs[0]._end_failed = failed.append
    with ranks:
        until(lambda: failed == ["NCCL reports COMM_ERROR"])
    assert not ranks.ended


@pytest.fixture(autouse=True)
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer of a process that hangs would end the tests after a pause of the machine."""
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *args, **more: None)
