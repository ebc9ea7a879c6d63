# SPDX-License-Identifier: Apache-2.0
"""The launcher starts ranks, passes signals on, and ends all of them together.

Ranks are shell scripts, which start in milliseconds.
"""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_keye.cli.local import launch

DRIVER = """
import signal, sys
from megatron_keye.cli.local import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind a &
if sys.argv[3] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
command = ["sh", "-c", sys.argv[1]]
grace = float(sys.argv[2])
sys.exit(launch(command, 2, stop_grace_seconds=grace, failure_grace_seconds=grace))
"""
LONG = 60.0
"""Grace period of tests that do not wait for it."""
AT_ONCE = 10.0
"""Limit for what must not wait for the grace period, on a busy machine."""
SAVES = """
exec 2>/dev/null  # where the shell reports that its `sleep` was killed
trap 'echo saved; exit 7' TERM
trap 'echo passed on; exit 75' USR1
echo ready
while :; do sleep 0.05; done
"""
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def run(script: str, num_ranks: int = 2, grace_seconds: float = LONG) -> int:
    return launch(
        ["sh", "-c", script],
        num_ranks,
        stop_grace_seconds=grace_seconds,
        failure_grace_seconds=grace_seconds,
    )


@contextmanager
def started(script: str, grace_seconds: float = LONG, how: str = "") -> Iterator["Started"]:
    """Start a launcher with two ranks in a new process group, and wait for both."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, script, str(grace_seconds), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        yield Started(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Started:
    """A running launcher."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def send_to_all(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def outcome(self) -> tuple[int, list[str], str]:
        """Return exit status, lines that ranks wrote, and errors."""
        output, errors = self.process.communicate(timeout=AT_ONCE)
        return self.process.returncode, output.splitlines(), errors


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + AT_ONCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_find_their_numbers_and_each_other(tmp_path: Path) -> None:
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = " ".join(f"${name}" for name in names)
    assert run(f"echo {values} > {tmp_path}/$RANK", num_ranks=3) == 0
    variables = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in variables] == [
        [str(r), "3", "3", "127.0.0.1"] for r in range(3)
    ]
    assert len({words[4] for words in variables}) == 1 and int(variables[0][4]) > 1023


def test_rank_0_alone_gets_the_socket_at_which_ranks_meet(tmp_path: Path) -> None:
    code = (
        "import os, socket, sys; number = os.environ.get('MASTER_LISTEN_FD');"
        "port = number and socket.socket(fileno=int(number)).getsockname()[1];"
        "file = open(sys.argv[1] + os.environ['RANK'], 'w');"
        "print(port or 0, os.environ['MASTER_PORT'], file=file)"
    )
    command = [sys.executable, "-c", code, f"{tmp_path}/"]
    assert launch(command, 2) == 0
    first, second = ((tmp_path / name).read_text().split() for name in "01")
    assert first[0] == first[1] == second[1] and second[0] == "0"


def test_a_rank_gets_its_environment_and_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert run(f"echo $OMP_NUM_THREADS$PYTHONSAFEPATH > {tmp_path}/is; cat", num_ranks=1) == 0
    assert (tmp_path / "is").read_text() == "31\n"


def test_the_first_failure_ends_the_others_and_is_the_status(
    capfd: pytest.CaptureFixture[str],
) -> None:
    began = time.monotonic()
    assert run('[ "$RANK" = 1 ] && exit 3; ' + SAVES) == 3
    assert time.monotonic() - began < AT_ONCE
    written = capfd.readouterr()
    assert "saved" in written.out.splitlines() and not written.err


def test_a_rank_that_a_signal_ends_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    script = 'if [ "$RANK" = 1 ]; then echo $$; kill -9 $$; fi; trap "exit 0" TERM; sleep 9 & wait'
    assert run(script) == 128 + signal.SIGKILL
    written = capfd.readouterr()
    assert f"process {written.out.strip()} was ended by signal 9\n" in written.err


def test_a_rank_that_does_not_end_is_killed_after_the_grace() -> None:
    began = time.monotonic()
    assert run('[ "$RANK" = 1 ] && sleep 0.5 && exit 3; ' + STUBBORN, grace_seconds=0.3) == 3
    assert time.monotonic() - began < AT_ONCE


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
@pytest.mark.parametrize("reaches_all", [False, True], ids=["launcher", "process group"])
def test_a_signal_lets_ranks_save(number: int, status: int, reaches_all: bool) -> None:
    with started(SAVES) as running:
        (running.send_to_all if reaches_all else running.send)(number)
        assert running.outcome() == (status, ["saved", "saved"], "")


def test_a_second_interrupt_does_not_wait() -> None:
    with started(STUBBORN) as running:
        running.send(signal.SIGINT)
        time.sleep(0.5)
        assert running.process.poll() is None
        running.send(signal.SIGINT)
        assert running.outcome() == (130, [], "")


@pytest.mark.parametrize("reaches_all", [False, True], ids=["launcher", "process group"])
def test_usr1_is_passed_on(reaches_all: bool) -> None:
    with started(SAVES) as running:
        (running.send_to_all if reaches_all else running.send)(signal.SIGUSR1)
        status, output, errors = running.outcome()
    assert (status, errors) == (75, "")
    # The first rank that has ended makes the launcher ask the other one, too.
    assert "passed on" in output and set(output) <= {"passed on", "saved"}


def test_signals_without_a_meaning_are_ignored() -> None:
    with started(SAVES) as running:
        for number in (signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM, signal.SIGRTMIN, 64):
            running.send_to_all(number)
        time.sleep(0.3)
        assert running.process.poll() is None
        running.send(signal.SIGTERM)
        assert running.outcome() == (143, ["saved", "saved"], "")


def test_a_second_term_does_not_hurry() -> None:
    with started(SAVES.replace("echo saved", 'trap "" TERM; sleep 0.5; echo saved')) as running:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            running.send_to_all(number)
            time.sleep(0.1)
        assert running.outcome() == (143, ["saved", "saved"], "")


def test_ranks_stop_and_go_on_with_the_launcher() -> None:
    with started(SAVES) as running:
        all_of_them = [psutil.Process(running.process.pid), *running.ranks()]
        running.send(signal.SIGTSTP)
        wait_until(lambda: all(p.status() == psutil.STATUS_STOPPED for p in all_of_them))
        running.send(signal.SIGCONT)
        wait_until(lambda: all(p.status() != psutil.STATUS_STOPPED for p in all_of_them))
        running.send(signal.SIGTERM)
        assert running.outcome() == (143, ["saved", "saved"], "")


def test_a_killed_launcher_takes_its_ranks_along() -> None:
    with started(STUBBORN) as running:
        ranks = running.ranks()
        running.send(signal.SIGKILL)
        running.process.wait()
        wait_until(lambda: not any(rank.is_running() for rank in ranks))


def test_a_closed_terminal_lets_ranks_save(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    script = SAVES.replace("echo saved", f"touch {tmp_path}/$RANK")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, script, str(LONG), ""],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    shown = b""
    while shown.count(b"ready") < 2:
        shown += os.read(ours, 100)
    os.close(ours)
    assert process.wait(AT_ONCE) == 143
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    with started(SAVES, how="nohup") as running:
        running.send_to_all(signal.SIGHUP)
        time.sleep(0.5)
        assert running.process.poll() is None
        running.send(signal.SIGTERM)
        assert running.outcome()[0] == 143


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    assert run("true", num_ranks=1) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)] == before
