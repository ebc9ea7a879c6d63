"""Starts one process per rank on this machine and ends them together.

Stands in for torchrun, whose own traceback would bury the one sentence that a rank says about a
wrong setting. Standard library only: torch takes seconds to import, and the ranks do that.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_keye.cli.environment import complete_environment
from megatron_keye.errors import UserError

DEFAULT_CPU_RANKS = 4
STOP_GRACE_SECONDS = 300.0
"""Of ranks that are to save before they end: one step and one checkpoint."""
FAILURE_GRACE_SECONDS = 10.0
"""Of ranks whose peer has failed."""
_POLL_SECONDS = 0.1
_STATUS_AFTER = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
_OF_THE_LAUNCHER = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What a terminal sends to every process in it; ranks leave it to the launcher."""


def launch(
    command: Sequence[str],
    num_ranks: int,
    *,
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
    failure_grace_seconds: float = FAILURE_GRACE_SECONDS,
) -> int:
    """Run a command once per rank and return the exit status of the whole.

    INT, TERM and HUP let ranks finish their step and save; a second INT does not wait. USR1 is
    passed on, QUIT ignored.

    Args:
        command: Of a rank, which finds its number in the variables that torchrun sets, too.
        num_ranks: Processes.
        stop_grace_seconds: What ranks get to end after a signal.
        failure_grace_seconds: What ranks get to end after another one has failed.

    Returns:
        130 after INT, 143 after TERM or HUP, else that of the first rank that failed, 128 + n for
        one that signal n has ended; 0 when all ended well.
    """
    ranks = _Ranks()
    with ranks.hears_signals():
        try:
            ranks.start(command, num_ranks)
            return ranks.wait(stop_grace_seconds, failure_grace_seconds)
        finally:
            ranks.kill()


def count_gpus() -> int:
    """Return how many GPUs torch sees.

    Raises:
        UserError: When there may be some, and torch cannot be asked.
    """
    # The device files of the NVIDIA driver say at once that there is none.
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0
    question = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run(
        [sys.executable, "-P", "-c", question], stdout=subprocess.PIPE, text=True, check=False
    )
    if asked.returncode != 0:
        raise UserError(
            "--ranks: torch cannot count the GPUs for the reason above; megatron-keye doctor says "
            "what is missing"
        )
    return int(asked.stdout)


class _Ranks:
    """The processes of all ranks, and the signals that came and are not dealt with yet."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals: deque[int] = deque()

    @contextmanager
    def hears_signals(self) -> Iterator[None]:
        """Note signals instead of ending by them; what is ignored already (nohup) stays so."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {
            number: signal.signal(number, note)
            for number in (*_STATUS_AFTER, signal.SIGUSR1)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        before[signal.SIGQUIT] = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, command: Sequence[str], num_ranks: int) -> None:
        """Start all ranks."""
        environment = dict(os.environ)
        complete_environment(environment, local_ranks=num_ranks)
        environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(num_ranks)
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = "127.0.0.1", str(_free_port())
        for rank in range(num_ranks):
            process = subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                preexec_fn=_leave_signals,
            )
            self._processes.append(process)

    def wait(self, stop_grace_seconds: float, failure_grace_seconds: float) -> int:
        """Return the exit status when all have ended; see `launch`."""
        running = list(self._processes)
        while running:
            time.sleep(_POLL_SECONDS)
            failed = next((process for process in running if process.poll()), None)
            # After the look at the ranks: one that a signal ended as well is no failure.
            while self._signals:
                number = self._signals.popleft()
                if number in _STATUS_AFTER:
                    self._end(stop_grace_seconds)
                    return _STATUS_AFTER[signal.Signals(number)]
                self._send(number)
            if failed is not None:
                status = _status_of(failed)
                self._end(failure_grace_seconds)
                return status
            running = [process for process in running if process.returncode is None]
        return 0

    def _end(self, grace_seconds: float) -> None:
        """Ask the ranks to end, wait so long, insist; INT insists at once."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._any_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            while self._signals:
                number = self._signals.popleft()
                if number == signal.SIGINT:
                    deadline = time.monotonic()
                elif number == signal.SIGUSR1:
                    self._send(number)
        self.kill()

    def kill(self) -> None:
        """End at once what still runs."""
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _any_alive(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def _status_of(failed: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a rank, and tell of the signal that ended it."""
    if failed.returncode > 0:
        return int(failed.returncode)
    number = -failed.returncode
    # It could not say anything itself.
    sys.stderr.write(f"megatron-keye train: process {failed.pid} was ended by signal {number}\n")
    return 128 + number


def _leave_signals() -> None:
    """Make a rank ignore what is the launcher's to hear; runs between fork and exec."""
    for number in _OF_THE_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
