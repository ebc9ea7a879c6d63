# SPDX-License-Identifier: Apache-2.0
"""How far one rank is in a step's order of exchanges, and which of them it may start next.

Transport and the simulator share it, so that both keep the order for which `plan/order.py` shows
that a step cannot deadlock.
"""

from collections.abc import Callable, Iterator, Sequence

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.plan.order import Exchange
from megatron_keye.plan.places import first_stage_ranks, is_encoded_by_decoder


class ExchangeCursor:
    """The exchanges of one step on one rank, which starts them in order, each once it is ready."""

    def __init__(
        self,
        order: Sequence[Exchange],
        parallel: ParallelConfig,
        rank: int,
        *,
        num_micro_batches: int,
    ) -> None:
        """Begin before the first exchange.

        A rank of vision alone may start each exchange as soon as it is ready; the decoder's ranks
        may start features that they encode so. First-stage ranks start others where their schedule
        reaches them, so that none waits for other ranks on the device.

        Args:
            order: All exchanges of the step.
            parallel: Degrees and placement.
            rank: This rank; one that neither encodes nor embeds has no exchanges.
            num_micro_batches: Micro-batches of a replica.
        """

        def is_around(exchange: Exchange) -> bool:
            return is_encoded_by_decoder(parallel.vision, exchange.micro_batch, num_micro_batches)

        runs_decoder = rank < parallel.decoder.num_ranks
        embeds = rank in first_stage_ranks(parallel.decoder)
        self.order = [
            exchange
            for exchange in order
            if (runs_decoder if is_around(exchange) else embeds or not runs_decoder)
        ]
        self._num_started = 0
        self._num_allowed = len(self.order)
        if runs_decoder:
            self._num_allowed = sum(e.kind == "features" and is_around(e) for e in self.order)

    @property
    def started(self) -> list[Exchange]:
        """What this rank has started, in order."""
        return self.order[: self._num_started]

    @property
    def pending(self) -> list[Exchange]:
        """What it has not started yet, in order."""
        return self.order[self._num_started :]

    def allow_through(self, exchange: Exchange) -> None:
        """Allow all exchanges up to and with this one, which the schedule has reached."""
        self._num_allowed = max(self._num_allowed, self.order.index(exchange) + 1)

    def allow_all(self) -> None:
        """Allow the rest, since this rank's decoder has finished."""
        self._num_allowed = len(self.order)

    def take_ready(self, is_ready: Callable[[Exchange], bool]) -> Iterator[Exchange]:
        """Yield the exchanges to start now, up to the first that is not allowed or not ready.

        Args:
            is_ready: Returns whether this rank has all rows that it sends in an exchange.
        """
        while self._num_started < self._num_allowed:
            exchange = self.order[self._num_started]
            if not is_ready(exchange):
                return
            self._num_started += 1
            yield exchange
