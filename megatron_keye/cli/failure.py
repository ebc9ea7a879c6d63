# SPDX-License-Identifier: Apache-2.0
"""What a rank says when it ends before the run does, so that each failure is told once.

The first rank that fails tells of itself. One that fails since it lost another says nothing: the
launcher tells of the lost one, or, under Slurm and torchrun, the first rank that noticed.
"""

import atexit
import os
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from megatron_keye.cli.shared_heartbeats import has_launcher, read_heartbeats
from megatron_keye.cli.status import FAILED, HUNG, LOST_PEERS, report_error
from megatron_keye.errors import UserError
from megatron_keye.observe.hang import Peer, process_state
from megatron_keye.observe.watchdog import Watchdog
from megatron_keye.parallel.process import Process

SECONDS_FOR_THE_FIRST = 3.0
"""A rank that fails because another did waits, so that the launcher sees the other one first."""
_SECONDS_TO_FIND = 20.0
"""Most time to find out which rank was lost."""
_SECONDS_OF_SILENCE = 12.0
"""After which a rank of another machine is lost: two heartbeats and more."""
_SECONDS_TO_BE_HEARD = 6.0
"""More than a heartbeat. Rank 0 hosts the store, in which others read that it has told."""
_EXCHANGES = ("gloo/transport", "NCCL")
"""Parts of what a lost exchange raises where that has no class of its own."""


def end_failed(error: Exception, process: Process, watchdog: Watchdog) -> int:
    """Tell of an error that ends this rank, unless it follows from that of another.

    Args:
        error: What training raised.
        process: This rank.
        watchdog: Of this rank.

    Returns:
        The exit status.
    """
    if watchdog.is_ending:
        time.sleep(_SECONDS_TO_FIND)  # Its thread ends this process before.
    is_lost_exchange = _is_lost_exchange(error)
    is_told = is_lost_exchange and _is_loss_told(process, watchdog)
    if is_told or not process.is_first_to_fail():
        time.sleep(SECONDS_FOR_THE_FIRST)
        return LOST_PEERS
    beat = process.heartbeat
    if isinstance(error, UserError):
        status = report_error(error)
        if beat.step:
            sys.stderr.write(f"{beat.who()}: {beat.where()}; {beat.how_to_go_on()}\n")
    elif is_lost_exchange:
        status = LOST_PEERS
        reason = str(error).strip().partition("\n")[0]
        sys.stderr.write(
            f"error: {beat.who()}: {beat.where()}: an exchange between ranks failed, and none of "
            f"them is missing ({reason}); {beat.how_to_go_on()}\n"
        )
    else:
        status = FAILED
        sys.stderr.write(f"error: {beat.who()} failed: {beat.where()}; {beat.how_to_go_on()}\n")
        traceback.print_exception(error)
    if process.rank == 0 and process.num_ranks > 1 and not has_launcher():
        time.sleep(_SECONDS_TO_BE_HEARD)
    return status


def exit_failed(status: int) -> NoReturn:
    """End this process, whose error was told, without taking its process groups apart.

    Their threads may meet the same failure in the midst of it, and C++ would then abort: the
    status would be another. Python's exit functions run, since they give the run's lock back.

    Args:
        status: The exit status.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_hung() -> NoReturn:
    """End this process of a run that hangs, whatever its main thread does."""
    os._exit(HUNG)


def end_without_exchanges(error: str, process: Process, watchdog: Watchdog) -> NoReturn:
    """Tell of an exchange that failed on the device, where the main thread waits for ever.

    Args:
        error: What NCCL reports.
        process: This rank.
        watchdog: Of this rank.
    """
    os._exit(end_failed(dist.DistBackendError(error), process, watchdog))


def _is_lost_exchange(error: BaseException) -> bool:
    """Return whether an error is one of exchanges, as a lost rank causes on all others."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _EXCHANGES):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_lost_exchange(cause)


def _is_loss_told(process: Process, watchdog: Watchdog) -> bool:
    """Return whether it was told why this rank lost an exchange, by another or by this function.

    False after a while in which no rank was found to be lost, and none has failed.
    """
    deadline = time.monotonic() + _SECONDS_TO_FIND
    while time.monotonic() < deadline:
        if has_launcher():
            beats, own = read_heartbeats(), process.heartbeat
            is_gone = any(process_state(beat, own.pid_space) == "gone" for beat in beats)
            if is_gone or process.has_any_failed():
                return True
        elif _tells_of_loss(process, watchdog):
            return True
        time.sleep(0.5)
    return False


def _tells_of_loss(process: Process, watchdog: Watchdog) -> bool:
    """Find a lost rank, and tell of it if no other rank does; return whether it is told."""
    try:
        watchdog.hear()
        lost = [peer for peer in watchdog.peers() if peer.is_lost(_SECONDS_OF_SILENCE)]
        if not lost:
            return process.has_any_failed()
        is_teller = process.claim_failure(process.store)
    except RuntimeError:
        # Rank 0, which hosts the store, has ended; the first that is left tells of it.
        host, *others = watchdog.peers()
        lost, left = [host], [peer for peer in others if peer.state not in ("gone", "stopped")]
        is_first = bool(left) and left[0].heartbeat.rank == process.rank
        is_teller = is_first and not watchdog.is_reported
    if is_teller:
        _tell_of(lost[0], process)
    return True


def _tell_of(lost: Peer, process: Process) -> None:
    beat = process.heartbeat
    sys.stderr.write(
        f"error: {lost.heartbeat.who()}, process {lost.heartbeat.pid}, was lost, last heard of: "
        f"{lost.heartbeat.where()}; {beat.who()} noticed: {beat.where()}; {beat.how_to_go_on()}\n"
    )
