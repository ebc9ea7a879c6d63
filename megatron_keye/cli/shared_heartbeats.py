# SPDX-License-Identifier: Apache-2.0
"""Memory in which a machine's ranks leave their heartbeats for the launcher that started them.

A rank that a signal ended cannot say where it was, and the launcher knows its process only. The
memory is an anonymous file, which is gone with the last process that has it open.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megatron_keye.observe.heartbeat import Heartbeat

_VARIABLE = "MEGATRON_KEYE_HEARTBEATS"
"""Tells ranks where the memory is."""
_SLOT_BYTES = 4096
"""Of a rank; a heartbeat has about 500 bytes and a line break at its end."""


@contextmanager
def shared_heartbeats() -> Iterator[None]:
    """Make memory that ranks find which are started inside the context."""
    memory = os.memfd_create("heartbeats")
    os.environ[_VARIABLE] = f"/proc/{os.getpid()}/fd/{memory}"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        os.close(memory)


def has_launcher() -> bool:
    """Return whether a launcher reads this rank's heartbeats, and tells how ranks ended."""
    return os.path.exists(os.environ.get(_VARIABLE, ""))


def open_slot(rank: int) -> Callable[[Heartbeat], None] | None:
    """Return a function that leaves the heartbeat of a rank; None without a launcher of ours."""
    if not has_launcher():
        return None
    memory = os.open(os.environ[_VARIABLE], os.O_WRONLY)

    def leave(heartbeat: Heartbeat) -> None:
        text = f"{heartbeat.to_text()}\n".encode()
        if len(text) <= _SLOT_BYTES:
            os.pwrite(memory, text, rank * _SLOT_BYTES)

    return leave


def read_heartbeats() -> list[Heartbeat]:
    """Return the heartbeats that ranks have left; none without a launcher of ours."""
    if not has_launcher():
        return []
    found = []
    with open(os.environ[_VARIABLE], "rb") as memory:
        while slot := memory.read(_SLOT_BYTES):
            # A rank that has not begun has left none; one that was killed may have half of one.
            with suppress(ValueError):
                found.append(Heartbeat.from_text(slot.partition(b"\n")[0]))
    return found


def describe_end(pid: int, number: int) -> str:
    """Return how a rank's process ended, and where it was; "" if it could say so itself.

    Args:
        pid: Its process.
        number: Signal that ended it, 0 if none did.
    """
    beat = next((beat for beat in read_heartbeats() if beat.pid == pid), None)
    number = number or (beat.end_signal if beat else 0)
    if not number:
        return ""
    ended = f"process {pid} was ended by signal {number}"
    if beat is None:
        return ended
    # Those of real time have no names.
    name = next((each.name for each in signal.Signals if each == number), "no name")
    memory = ", as the kernel does where memory runs out" if number == signal.SIGKILL else ""
    return f"{ended} ({name}{memory}): {beat.who()}: {beat.where()}; {beat.how_to_go_on()}"
