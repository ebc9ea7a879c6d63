# SPDX-License-Identifier: Apache-2.0
"""Ends a run that hangs, after telling which rank holds it up and writing every rank's stack.

Each rank has two threads. One sends its heartbeat to the job's store every few seconds and, when
this rank has long been without progress, reads all others; it may block in the store. The other
never blocks: it judges what is known, and ends this process. With 512 ranks the store gets 200
messages of half a kilobyte a second, and while a run hangs 20 reads of 200 KB a second.

What it cannot see: a rank whose main thread works without ever coming to an end (it marks no
progress, so it counts as hung), and, in this process, a call that holds the interpreter, which
stops both threads. Other ranks then do not hear from it; without any, a timer of `faulthandler`,
which needs no interpreter, writes the stack to standard error and ends the process.
"""

import faulthandler
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_keye.observe.hang import (
    SLOW_FACTOR,
    Peer,
    hang_report,
    is_hung,
    process_state,
    reporter,
)
from megatron_keye.observe.heartbeat import Heartbeat, Stillness

_MOST_BEAT_SECONDS = 5.0
_BEATS_PER_LIMIT = 20
_SECONDS_PER_PEER = 0.05
"""Between two reads of all ranks, for each rank, so that the store is not flooded."""
_SECONDS_TO_CLAIM = 2.0
_SECONDS_TO_WRITE = 5.0
"""A file system that hangs must not keep a run that hangs because of it."""


class Board(Protocol):
    """Where the ranks of a job leave their heartbeats."""

    def post(self, text: str) -> None:
        """Leave this rank's heartbeat."""

    def read(self) -> Sequence[bytes]:
        """Return the heartbeats of all ranks, by rank, once all have left one."""

    def read_host(self) -> bytes:
        """Return the heartbeat of rank 0, which hosts the board and takes it along."""

    def is_reported(self) -> bool:
        """Return whether a rank has claimed to report why the run ends."""

    def claim_report(self) -> bool:
        """Return whether this rank is the first that asks, and so reports for all."""


class Watchdog:
    """Watches the run from one rank. Create it after all ranks have joined."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        board: Board,
        *,
        roles: Sequence[str],
        limit_seconds: float,
        folder: Path,
        tell: Callable[[str], object],
        end: Callable[[], None],
        find_error: Callable[[], str] = lambda: "",
        end_failed: Callable[[str], None] = lambda error: None,
    ) -> None:
        """Watch nothing yet.

        Args:
            heartbeat: Of this rank.
            board: The heartbeats of all.
            roles: Role of each rank in words.
            limit_seconds: Time without progress after which the run ends; infinite for never.
            folder: Where the folder of stacks is made.
            tell: Shows the user a report.
            end: Ends this process at once, whatever its main thread does.
            find_error: Returns what failed without reaching the main thread, "" if nothing did.
            end_failed: Tells of that and ends this process.
        """
        self._own, self._board, self._limit = heartbeat, board, limit_seconds
        self._folder, self._tell, self._end = folder, tell, end
        self._find_error, self._end_failed = find_error, end_failed
        num_ranks = len(roles)
        self._beat = min(_MOST_BEAT_SECONDS, limit_seconds / _BEATS_PER_LIMIT)
        self._read_every = max(self._beat, num_ranks * _SECONDS_PER_PEER)
        self.silent_limit = max(4 * self._read_every, limit_seconds / 4)
        """Seconds after which a rank should have been heard."""
        now = time.monotonic()
        self._still = Stillness(heartbeat)
        self._peers = [
            Heartbeat(rank=rank, role=role, host="", pid=0, pid_space="")
            for rank, role in enumerate(roles)
        ]
        self._heard, self._last_read, self._last_contact = [now] * num_ranks, now, now
        self._closed = threading.Event()
        self.is_ending = False
        """Whether this rank has found that the run hangs and is about to end."""
        self.is_reported = False
        """Whether a rank has claimed to report why the run ends, as far as this one has heard."""

    def start(self) -> None:
        """Begin to watch."""
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def peers(self) -> list[Peer]:
        """Return what is known of every rank, this one included."""
        now, own = time.monotonic(), self._own
        # Where the store does not answer, that tells of rank 0 alone, which hosts it.
        is_cut_off = now - self._last_contact >= self.silent_limit
        known = []
        for beat, heard in zip(self._peers, self._heard, strict=True):
            silent = (self._last_read if is_cut_off else now) - heard
            if beat.rank == 0 and is_cut_off:
                silent = now - self._last_contact
            known.append(
                Peer(
                    heartbeat=own if beat.rank == own.rank else beat,
                    still_seconds=beat.still_seconds + now - heard,
                    silent_seconds=max(0.0, silent),
                    state=process_state(beat, own.pid_space),
                )
            )
        known[own.rank] = Peer(
            heartbeat=own, still_seconds=self._still.seconds(), silent_seconds=0, state="running"
        )
        return known

    def hear(self) -> None:
        """Read the heartbeats of all ranks.

        Raises:
            RuntimeError: If the store does not answer.
        """
        for text in self._board.read():
            self._take(Heartbeat.from_text(text))
        self._last_read = self._last_contact = time.monotonic()

    def _take(self, beat: Heartbeat) -> None:
        """Take over a heartbeat, heard now if it is not the one that is known."""
        known = self._peers[beat.rank]
        if (beat.pid, beat.num_beats) != (known.pid, known.num_beats):
            self._peers[beat.rank], self._heard[beat.rank] = beat, time.monotonic()

    def _talk(self) -> None:
        """Send heartbeats, and read those of others; a thread's whole life."""
        try:
            self._post()
            self.hear()
            while not self._closed.wait(self._beat):
                self._post()
                is_due = time.monotonic() - self._last_read >= self._read_every
                if is_due and self._still.seconds() > self._limit / 2:
                    self.hear()
        except (RuntimeError, ValueError):
            # The rank that hosts the store has ended; `peers` shows that it does not answer.
            return

    def _post(self) -> None:
        self._own.num_beats += 1
        self._own.still_seconds = self._still.seconds()
        self._board.post(self._own.to_text())
        self.is_reported = self.is_reported or self._board.is_reported()
        if self._own.rank != 0:
            self._take(Heartbeat.from_text(self._board.read_host()))
        self._last_contact = time.monotonic()

    def _watch(self) -> None:
        """Judge what is known until the run fails or hangs; a thread's whole life."""
        while True:
            if math.isfinite(self._limit):
                # One limit behind that of the slowest work, where other ranks would judge.
                seconds = (SLOW_FACTOR + 1) * self._limit
                faulthandler.dump_traceback_later(seconds, exit=True, file=2)
            began = time.monotonic()
            if self._closed.wait(self._beat):
                return
            slept = time.monotonic() - began
            error = self._find_error()
            if error:
                self._end_failed(error)
                return
            if slept > 2 * self._beat + self._limit / 4:
                # This process was stopped, and goes on: nothing that it knows holds.
                self._still.forget()
                continue
            peers = self.peers() if self._still.seconds() >= self._limit else []
            if peers and self._is_hung(peers):
                self._end_hung(peers)
                return

    def _is_hung(self, peers: list[Peer]) -> bool:
        own = peers.pop(self._own.rank)
        is_so = is_hung(own, peers, limit_seconds=self._limit, silent_limit=self.silent_limit)
        peers.insert(self._own.rank, own)
        return is_so

    def _end_hung(self, peers: list[Peer]) -> None:
        """Write stacks, report if no other rank does, and end the process."""
        self.is_ending = True
        folder = self._folder / f"step-{max(peer.heartbeat.step for peer in peers)}"
        _within(_SECONDS_TO_WRITE, lambda: self._write_stacks(folder))
        is_first = _within(_SECONDS_TO_CLAIM, self._board.claim_report)
        if is_first is None:
            is_first = reporter(peers, silent_limit=self.silent_limit) == self._own.rank
        if is_first:
            self._tell(
                hang_report(
                    peers,
                    limit_seconds=self._limit,
                    silent_limit=self.silent_limit,
                    folder=folder,
                )
            )
        # The others judge within a beat or two, and the first that ends, ends all.
        self._closed.wait(min(2 * self._beat, _SECONDS_TO_WRITE))
        self._end()

    def _write_stacks(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self._own.rank}.txt").open("w") as file:
            still = f"no progress for {self._still.seconds():.0f} s"
            file.write(f"{self._own.who()}: {self._own.where()}; {still}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        return True


def _within[Result](seconds: float, work: Callable[[], Result]) -> Result | None:
    """Return the result of some work, None if it fails or takes longer."""
    results: list[Result] = []

    def run() -> None:
        try:
            results.append(work())
        except (OSError, RuntimeError):
            return

    thread = threading.Thread(target=run, name="watchdog_end", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
