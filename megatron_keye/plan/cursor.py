"""How far one rank is in a step's order of exchanges, and which of them it may start next.

Transport and the simulator share it, so that both keep the order for which `plan/order.py` shows
that a step cannot deadlock.
"""

from collections.abc import Callable, Iterator, Sequence

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.plan.order import Exchange
from megatron_keye.plan.places import first_stage_ranks, vision_ranks


class ExchangeCursor:
    """The exchanges of one step on one rank, which starts them in order, each once it is ready."""

    def __init__(self, order: Sequence[Exchange], parallel: ParallelConfig, rank: int) -> None:
        """Begin before the first exchange.

        A dedicated vision rank may start each exchange as soon as it is ready; colocated ranks
        may start those of features so. First-stage ranks start others where their schedule
        reaches them, so that none waits for other ranks on the device.

        Args:
            order: All exchanges of the step.
            parallel: Degrees and placement.
            rank: This rank; one outside the transport group has no exchanges.
        """
        # Two ranges: `transport_ranks` sorts all of them, and every step makes a cursor.
        transports = rank in vision_ranks(parallel) or rank in first_stage_ranks(parallel.decoder)
        self.order = list(order) if transports else []
        self._num_started = 0
        if rank >= parallel.decoder.num_ranks:
            self._num_allowed = len(self.order)
        elif parallel.vision.placement == "dedicated":
            self._num_allowed = 0
        else:
            self._num_allowed = sum(exchange.kind == "features" for exchange in self.order)

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
