# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of the next step in a thread, while the current step runs.

Tokenizing, packing and planning release the interpreter for part of their time, and the step waits
for its device or its peers without it; what does not fit beside the step is waited for.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import PackedRow
from megatron_keye.errors import UserError

_CLOSING_SECONDS = 5.0
"""How long closing waits for a sample that is being read."""


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of one step."""

    rows: list[PackedRow]
    """All rows of the global batch, the same on every rank."""
    state: dict[str, Any]
    """The loader's state after them."""
    skipped: list[str]
    """A sentence for each sample that was skipped on the way to them."""
    num_steps: int
    """Steps of the whole run: those it sets, or, with training.epochs, as many as there will be if
    rows go on to hold as many samples as so far."""
    is_last: bool
    """Whether the run ends with them."""


@dataclass(frozen=True, kw_only=True)
class _ReadRows:
    """What the thread read, whatever the number of its step will be."""

    rows: list[PackedRow]
    state: dict[str, Any]
    skipped: list[str]
    share_done: float
    """Share of the epochs' samples that are done; 0 without epochs."""
    are_last: bool
    """Whether the epochs end with these rows."""


class ReadAhead:
    """Reads one step ahead, as the loader's only user.

    Args:
        run: Rows of a step, and when the run ends.
        loader: Where reading goes on.
        step: 0-based number of the first step to read.
        announce: Called in the thread with the rows of each step, in order.
    """

    def __init__(
        self,
        run: RunConfig,
        loader: RowLoader,
        step: int,
        announce: Callable[[list[PackedRow]], None],
    ) -> None:
        self._run, self._loader, self._announce = run, loader, announce
        self._step = step
        self._ends = False
        self._read: SimpleQueue[_ReadRows | Exception] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read the next step, once the last one that was begun has been taken."""
        assert self._thread is None, "one step is read ahead"
        # A daemon, so that a file system that hangs does not keep a process that has failed.
        self._thread = threading.Thread(target=self._work, name="read rows", daemon=True)
        self._thread.start()

    def take(self) -> StepRows:
        """Wait for the step that was begun.

        Raises:
            Exception: What reading, packing or planning this step raised.
        """
        assert self._thread is not None, "a step is taken after it was begun"
        result = self._read.get()
        self._thread.join()
        self._thread = None
        if isinstance(result, Exception):
            raise result
        self._step, self._ends = self._step + 1, result.are_last
        steps = self._run.training.steps
        return StepRows(
            rows=result.rows,
            state=result.state,
            skipped=result.skipped,
            num_steps=steps or round(self._step / result.share_done),
            is_last=result.are_last or self._step == steps,
        )

    def go_back(self, step: int) -> bool:
        """Number the steps from an earlier one on, and begin to read where nothing is being read.

        Args:
            step: Steps that are done now; rows go on where they are.

        Returns:
            Whether there are more rows.
        """
        self._step = step
        if self._thread is None and not self._ends:
            self.start()
        return not self._ends

    def close(self) -> None:
        """Wait for the thread, unless it hangs."""
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        """Read one step; the thread's whole life."""
        try:
            self._read.put(self._read_step())
        except Exception as error:
            self._read.put(error)

    def _read_step(self) -> _ReadRows:
        training = self._run.training
        rows = self._loader.next_rows(training.rows_per_step)
        if not rows:
            raise UserError(
                "data.samples: no usable sample is left of training.epochs = "
                f"{training.epochs:g}, expected one; correct the samples that were skipped"
            )
        rows += [self._loader.padding_row()] * (-len(rows) % self._run.rows_multiple)
        self._announce(rows)
        has_epochs = training.epochs > 0
        return _ReadRows(
            rows=rows,
            state=self._loader.state_dict(),
            skipped=self._loader.take_skipped(),
            share_done=self._loader.share_done if has_epochs else 0.0,
            are_last=has_epochs and self._loader.is_exhausted,
        )
