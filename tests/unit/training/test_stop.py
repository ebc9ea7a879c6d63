"""Signals are noted by the process that trains and reach none of those that it starts."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.training.stop import SIGNALS, StopRequest, hidden_from_children

ROOT = Path(__file__).resolve().parents[3]


def answer_after_signals() -> str:
    """Start a process as checkpointing does, send it every signal, and use it afterwards."""
    stop = StopRequest()
    stop.listen()
    with hidden_from_children():
        manager = multiprocessing.get_context("spawn").Manager()
        queue = manager.Queue()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.name, "the signal is delivered at the end of the block"
    assert stop.name == "SIGUSR1"
    for number in SIGNALS:
        os.kill(manager._process.pid, number)
        os.kill(os.getpid(), number)
    queue.put("still there")
    assert stop.name == "SIGUSR1", "only the first is noted"
    return str(queue.get())


def test_a_signal_that_came_while_it_was_blocked_is_noted() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.raise_signal(signal.SIGUSR1)  # to this thread, which has blocked it
        stop.listen()
        assert stop.name == "SIGUSR1"
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_processes_of_a_save_outlive_the_signals_that_stop_a_run() -> None:
    # In a process of its own, since handlers stay.
    code = f"from {__name__} import answer_after_signals as f\nprint(f())"
    guarded = "if __name__ == '__main__':\n    " + code.replace("\n", "\n    ")
    result = subprocess.run(
        [sys.executable, "-c", guarded], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "still there\n", result.stderr
