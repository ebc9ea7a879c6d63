# SPDX-License-Identifier: Apache-2.0
"""Starts one process per rank on this machine and stops them together.

Replaces torchrun, whose own traceback would hide a rank's one-line message about a wrong setting.
Standard library only: torch takes seconds to import, and only ranks need it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.shared_heartbeats import describe_end
from megatron_keye.errors import UserError
from megatron_keye.files.children import end_with_parent
from megatron_keye.files.temporary import remove_leftovers

DEFAULT_CPU_RANKS = 4
STOP_GRACE_SECONDS = 300.0
"""Time for ranks to finish after a signal: one step and one checkpoint."""
FAILURE_GRACE_SECONDS = 10.0
"""Time for ranks to end after another one has failed."""
LISTEN_FD = "MASTER_LISTEN_FD"
"""Variable of rank 0: descriptor of the socket, already listening, at which ranks meet."""
_POLL_SECONDS = 0.1
_STATUS_AFTER = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
_TERMINAL_SIGNALS = {signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP}
"""A terminal sends these to all its processes; ranks ignore them, the launcher decides."""
_HANDLED_SIGNALS = {*_STATUS_AFTER, signal.SIGUSR1, signal.SIGTSTP}
_OWN_FAULTS = {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT),
    *(signal.SIGTRAP, signal.SIGSYS, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGPIPE),
}
_HARMLESS_SIGNALS = {
    *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
    *(signal.SIGTTIN, signal.SIGTTOU),
}
_UNASKED_SIGNALS = (
    signal.valid_signals()
    - (_HANDLED_SIGNALS | _OWN_FAULTS | _HARMLESS_SIGNALS)
    - {signal.SIGKILL, signal.SIGSTOP}
)
"""Those, as USR2 and ALRM, that would end a process though they mean nothing here; launcher and
ranks ignore them."""


def meeting_socket() -> int | None:
    """Return the descriptor that the launcher handed to this rank, if it did."""
    return int(os.environ[LISTEN_FD]) if LISTEN_FD in os.environ else None


def launch(
    command: Sequence[str],
    num_ranks: int,
    *,
    shares_stdin: bool = False,
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
    failure_grace_seconds: float = FAILURE_GRACE_SECONDS,
) -> int:
    """Run a command once per rank and return the exit status of the job.

    INT, TERM and HUP let ranks finish their step and save; a second INT kills them. USR1 is
    passed on, TSTP and CONT stop all and let all go on, others as QUIT and USR2 are ignored. Ranks
    end with this process, even when it is killed; so call it in the main thread.

    Args:
        command: Command line of a rank, which reads the same variables as under torchrun.
        num_ranks: Processes to start.
        shares_stdin: Whether rank 0 reads this process's standard input; others have none.
        stop_grace_seconds: Time for ranks to end after a signal; then they are killed.
        failure_grace_seconds: Time for ranks to end after another one has failed.

    Returns:
        130 after INT, 143 after TERM or HUP, else that of the first rank that failed, 128 + n if
        signal n ended it; 0 when all succeeded.
    """
    ranks = _Ranks()
    with ranks.records_signals():
        try:
            ranks.start(command, num_ranks, shares_stdin=shares_stdin)
            return ranks.wait(stop_grace_seconds, failure_grace_seconds)
        finally:
            ranks.kill()
            remove_leftovers()


def count_gpus() -> int:
    """Return how many GPUs torch sees.

    Raises:
        UserError: When there may be some, and torch cannot be imported.
    """
    # Without device files of the NVIDIA driver there is none, and torch need not be imported.
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(
            "--ranks: torch cannot count the GPUs for the reason above; run megatron-keye doctor, "
            "which reports what is missing"
        )
    return int(done.stdout)


class _Ranks:
    """The processes of all ranks, and the signals received but not yet handled."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals: deque[int] = deque()

    @contextmanager
    def records_signals(self) -> Iterator[None]:
        """Record signals for `wait`; those ignored already (nohup) stay ignored."""

        def record(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {
            number: signal.signal(number, record)
            for number in _HANDLED_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        for number in _UNASKED_SIGNALS:
            before[number] = signal.signal(number, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, command: Sequence[str], num_ranks: int, *, shares_stdin: bool) -> None:
        """Start all ranks."""
        environment = dict(os.environ)
        complete_environment(environment, local_ranks=num_ranks)
        environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(num_ranks)
        # Rank 0 gets the socket itself: a free port could be another's by the time that it asks.
        with closing(socket.create_server(("127.0.0.1", 0), backlog=num_ranks)) as meeting:
            address, port = meeting.getsockname()
            environment["MASTER_ADDR"], environment["MASTER_PORT"] = address, str(port)
            environment.pop(LISTEN_FD, None)
            for rank in range(num_ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                passed = (meeting.fileno(),) if rank == 0 else ()
                if passed:
                    own[LISTEN_FD] = str(meeting.fileno())
                process = subprocess.Popen(
                    command,
                    env=environment | own,
                    stdin=None if shares_stdin and rank == 0 else subprocess.DEVNULL,
                    pass_fds=passed,
                    preexec_fn=partial(_begin_rank, os.getpid()),
                )
                self._processes.append(process)

    def wait(self, stop_grace_seconds: float, failure_grace_seconds: float) -> int:
        """Wait until all have ended and return the exit status of `launch`."""
        running = list(self._processes)
        while running:
            time.sleep(_POLL_SECONDS)
            failed = next((process for process in running if process.poll()), None)
            # Read after the poll above: a rank that the same signal ended has not failed.
            while self._signals:
                number = self._signals.popleft()
                if number in _STATUS_AFTER:
                    self._stop(stop_grace_seconds)
                    return _STATUS_AFTER[signal.Signals(number)]
                self._pass_on(number)
            if failed is not None:
                status = _status_of(failed)
                self._stop(failure_grace_seconds)
                return status
            running = [process for process in running if process.returncode is None]
        return 0

    def _stop(self, grace_seconds: float) -> None:
        """Send TERM, and kill ranks that still run after the grace period or at an INT."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._any_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            while self._signals:
                number = self._signals.popleft()
                if number == signal.SIGINT:
                    deadline = time.monotonic()
                elif number not in _STATUS_AFTER:
                    deadline += self._pass_on(number)
        self.kill()

    def _pass_on(self, number: int) -> float:
        """Send ranks a signal; at TSTP stop with them until CONT, and return for how long."""
        if number != signal.SIGTSTP:
            self._send(number)
            return 0.0
        began = time.monotonic()
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)
        return time.monotonic() - began

    def kill(self) -> None:
        """Kill the ranks that still run."""
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _any_alive(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def _status_of(failed: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a rank, and tell of the signal if one ended it."""
    number = max(0, -failed.returncode)
    # The rank could not write a message itself.
    described = describe_end(failed.pid, number)
    if described:
        sys.stderr.write(f"megatron-keye train: {described}\n")
    return 128 + number if number else int(failed.returncode)


def _begin_rank(launcher: int) -> None:
    """Bind a rank to the launcher; runs between fork and exec."""
    for number in _TERMINAL_SIGNALS | _UNASKED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(launcher)
