# SPDX-License-Identifier: Apache-2.0
"""Signals are noted by the process that trains."""

import signal

from megatron_keye.training.stop import SIGNALS, StopRequest


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
