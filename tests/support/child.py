# SPDX-License-Identifier: Apache-2.0
"""Runs a function in another process, case by case, so that a crash or hang is a result.

The process is spawned, not forked, since the parent may have threads of FFmpeg or a GPU library.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self


class Child:
    """A process that runs cases one after another; it is restarted after a crash or hang."""

    def __init__(self, function: Callable[[Any], Any], timeout_seconds: float) -> None:
        """Start the process.

        Args:
            function: Called in the process with each case; must not raise.
            timeout_seconds: After this time a case counts as hung.
        """
        self._function, self._timeout_seconds = function, timeout_seconds
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, case: Any) -> Any:
        """Return the function's result for a case, or "hung", or "crashed with ..."."""
        self._connection.send(case)
        try:
            if self._connection.poll(self._timeout_seconds):
                return self._connection.recv()
            outcome = "hung"
        except EOFError:
            self._process.join(5)
            outcome = f"crashed with exit code {self._process.exitcode}"
        self._stop()
        self._start()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.poll(60), "the process did not start"
        self._connection.recv()

    def _stop(self) -> None:
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
        self._process.join(5)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    connection.send("ready")
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        connection.send(function(case))
