"""How far one rank is in a step's order of exchanges, and which of them it may start next.

Transport and the simulator follow the same cursor, so that both keep the one order by which
`plan/order.py` shows that a step cannot deadlock.
"""

from collections.abc import Callable, Iterator, Sequence

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.plan.order import Exchange
from megatron_keye.plan.places import transport_ranks


class ExchangeCursor:
    """The exchanges of one step as one rank starts them: in order, each when it has its part."""

    def __init__(self, order: Sequence[Exchange], parallel: ParallelConfig, rank: int) -> None:
        """Stand before the first exchange.

        A rank that only encodes may start each as soon as it has its part of it. A rank of the
        first stage starts those of its own schedule where it meets them, so that nothing waits on
        its device meanwhile.

        Args:
            order: All exchanges of the step.
            parallel: Degrees and placement.
            rank: This rank; one that takes no part in transport has no exchanges.
        """
        self.order = list(order) if rank in transport_ranks(parallel) else []
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
    def waiting(self) -> list[Exchange]:
        """What it has not started yet, in order."""
        return self.order[self._num_started :]

    def allow_through(self, exchange: Exchange) -> None:
        """Allow all exchanges up to this one, which the schedule has reached."""
        self._num_allowed = max(self._num_allowed, self.order.index(exchange) + 1)

    def allow_all(self) -> None:
        """Allow the rest: the decoder of this rank has ended."""
        self._num_allowed = len(self.order)

    def take_ready(self, has_part: Callable[[Exchange], bool]) -> Iterator[Exchange]:
        """Yield the exchanges to start now, up to the first that is not allowed or not ready.

        Args:
            has_part: Tells whether this rank has all that it sends in an exchange.
        """
        while self._num_started < self._num_allowed:
            exchange = self.order[self._num_started]
            if not has_part(exchange):
                return
            self._num_started += 1
            yield exchange
