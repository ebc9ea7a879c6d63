# SPDX-License-Identifier: Apache-2.0
"""Judges heartbeats: whether a run hangs, and which rank is the likely cause. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_keye.observe.heartbeat import Heartbeat

SLOW_FACTOR = 3
"""A first step and slow work (`SLOW_WORK`) may show no progress for this many limits."""

ProcessState = Literal["running", "stopped", "gone", "elsewhere"]
"""Of a process as this machine sees it; elsewhere: it is not of this machine."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What this rank knows of another rank, or of itself."""

    heartbeat: Heartbeat
    """The last that was heard of it."""
    still_seconds: float
    """Since its last sign of progress."""
    silent_seconds: float
    """Since it was last heard."""
    state: ProcessState
    """Of its process."""

    def is_lost(self, silent_limit: float) -> bool:
        """Return whether it does not run any more, or does not answer.

        Args:
            silent_limit: Seconds after which a rank of another machine should have been heard.
        """
        return self.state in ("stopped", "gone") or self.silent_seconds >= silent_limit

    def limit(self, limit_seconds: float) -> float:
        """Return after how many seconds without progress it does not progress any more."""
        return limit_seconds * (SLOW_FACTOR if self.heartbeat.is_slow else 1)


def process_state(heartbeat: Heartbeat, pid_space: str) -> ProcessState:
    """Return the state of a rank's process.

    Args:
        heartbeat: The last that was heard of it.
        pid_space: That of the process that asks.
    """
    if heartbeat.pid_space != pid_space:
        return "elsewhere"
    try:
        # After the name in brackets, which may hold any characters.
        state = Path(f"/proc/{heartbeat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    if state in "ZX":
        return "gone"
    return "stopped" if state in "Tt" else "running"


def is_hung(
    own: Peer, others: Sequence[Peer], *, limit_seconds: float, silent_limit: float
) -> bool:
    """Return whether a run will not go on by itself.

    That is so when no rank progresses, since every slow one lets the others wait; or when this one
    does not and another is lost, whatever it was doing.

    Args:
        own: This rank.
        others: All other ranks.
        limit_seconds: Seconds without progress that are too many.
        silent_limit: Seconds after which a rank should have been heard.
    """
    if own.still_seconds < limit_seconds:
        return False
    if any(peer.is_lost(silent_limit) for peer in others):
        return True
    return all(peer.still_seconds >= peer.limit(limit_seconds) for peer in (own, *others))


def suspects(peers: Sequence[Peer], *, silent_limit: float) -> tuple[list[Peer], str]:
    """Return the ranks that most likely hold up all others, and why.

    Args:
        peers: All ranks, one or more.
        silent_limit: Seconds after which a rank should have been heard.
    """
    for state, reason in _STATES.items():
        found = [peer for peer in peers if peer.state == state]
        if found:
            return found, reason
    found = [peer for peer in peers if peer.silent_seconds >= silent_limit]
    if found and len(found) < len(peers):
        return found, _SILENT
    first = min(peer.heartbeat.step for peer in peers)
    found = [peer for peer in peers if peer.heartbeat.step == first]
    if len(found) < len(peers):
        return found, "others are at a later step"
    found = [peer for peer in peers if not peer.heartbeat.exchange]
    if found and len(found) < len(peers):
        return found, "others wait for an exchange, this one does not"
    longest = max(peers, key=lambda peer: peer.still_seconds)
    return [longest], "it has been without progress for longest"


def reporter(peers: Sequence[Peer], *, silent_limit: float) -> int:
    """Return the rank that tells of a hang where ranks cannot agree: the first that is not lost.

    Args:
        peers: All ranks, the one that asks among them.
        silent_limit: Seconds after which a rank should have been heard.
    """
    return min(p.heartbeat.rank for p in peers if not p.is_lost(silent_limit))


def hang_report(
    peers: Sequence[Peer], *, limit_seconds: float, silent_limit: float, folder: Path
) -> str:
    """Return what a user reads of a hang, a few lines whatever the number of ranks.

    Args:
        peers: All ranks.
        limit_seconds: Seconds without progress after which the run ends.
        silent_limit: Seconds after which a rank should have been heard.
        folder: Where the stacks are.
    """
    found, reason = suspects(peers, silent_limit=silent_limit)
    ranks = {peer.heartbeat.rank for peer in found}
    waiting = [peer for peer in peers if peer.heartbeat.rank not in ranks]
    lines = [
        f"error: no progress for {limit_seconds / 60:.3g} min (training.hang_minutes), so the run "
        "ends"
    ]
    lines += [
        f"suspect: {peer.heartbeat.who()}, process {peer.heartbeat.pid}: "
        f"{peer.heartbeat.where()}; {reason}"
        for peer in found[:_MOST_SHOWN]
    ]
    if len(found) > _MOST_SHOWN:
        lines.append(f"and {len(found) - _MOST_SHOWN} ranks like these")
    lines += [f"{p.heartbeat.who()}: {p.heartbeat.where()}" for p in waiting[:_MOST_SHOWN]]
    if len(waiting) > _MOST_SHOWN:
        lines.append(f"and {len(waiting) - _MOST_SHOWN} ranks more")
    lines += [f"stacks of ranks: {folder}", found[0].heartbeat.how_to_go_on()]
    return "\n  ".join(lines) + "\n"


_STATES: dict[ProcessState, str] = {
    "stopped": "its process was stopped (SIGSTOP, SIGTSTP or a debugger)",
    "gone": "its process is gone",
}
"""States of a process that explain a hang."""
_SILENT = (
    "it does not answer: its machine or network is lost, or a call that holds the interpreter "
    "does not return"
)
_MOST_SHOWN = 3
"""Ranks of a kind that a report names."""
