"""Carries features from vision ranks to the decoder ranks that own them, and gradients back.

One uneven all-to-all per micro-batch and direction, whose counts both ends take from the plan, so
only owned rows travel and any ratio of ranks is an ordinary case. Single messages would not do:
NCCL runs those of one group in order and sets up each pair of ranks with both present, so ranks
that are at different points of their schedules wait for each other for ever. All ranks start the
exchanges in the plan's order, which `plan/order.py` shows to be free of deadlock.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.plan.cursor import ExchangeCursor
from megatron_keye.plan.order import Exchange
from megatron_keye.plan.step import StepPlan, Transfer


@dataclass
class _State:
    """What this rank does in one exchange."""

    sent: list[Transfer]
    """By the group's ranks, then by tag, as on the other side."""
    taken: list[Transfer]
    """Likewise."""
    num_sent: list[int]
    """Rows to each rank of the group."""
    num_taken: list[int]
    """Rows from each."""
    outgoing: dict[int, Tensor] = field(default_factory=dict)
    """Rows by tag, until it starts."""
    has_started: bool = False
    """Whether this rank has started it."""
    work: dist.Work | None = None
    """Set from its start until it is waited for."""
    buffers: tuple[Tensor, Tensor] | None = None
    """Sent and received rows while they travel."""
    arrived: dict[int, Tensor] = field(default_factory=dict)
    """Received rows by tag, until they are taken."""

    @property
    def is_done(self) -> bool:
        """Whether all rows have travelled."""
        return self.has_started and (self.work is None or self.work.is_completed())

    def wait(self) -> None:
        """Wait until all rows have travelled, and drop the hold that torch keeps on them."""
        assert self.has_started, "it has started"
        if self.work is not None:
            self.work.wait()
            self.work = None


class FeatureTransport:
    """The messages of one step. Make a new one for each step."""

    def __init__(
        self,
        plan: StepPlan,
        grid: Grid,
        recorder: Recorder,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Prepare all exchanges.

        Args:
            plan: The step's plan.
            grid: The transport group, and this rank.
            recorder: Notes when this rank sends and waits.
            width: Width D of a feature.
            dtype: Type in which features and gradients travel.
            device: Where buffers live.
        """
        self._plan, self._grid, self._recorder, self._device = plan, grid, recorder, device
        self._empty = torch.empty(0, width, dtype=dtype, device=device)
        self._states = {exchange: self._state(exchange) for exchange in plan.exchanges}
        self._cursor = ExchangeCursor(plan.exchanges, grid.parallel, grid.rank)

    def start(self) -> None:
        """Start what needs nothing of this rank, such as a first micro-batch without its part."""
        self._start_ready()

    def send_features(self, chunk: int, features_MD: Tensor) -> None:
        """Send a chunk's features to their owners, without waiting.

        A micro-batch goes out when the last of this rank's chunks that feed it is there.

        Args:
            chunk: Index of the chunk in the plan; a rank sends its chunks in order.
            features_MD: [M, D], all merged tokens of the chunk.
        """
        with self._recorder.span("send", f"chunk {chunk}"):
            for transfer in self._plan.transfers_of(chunk):
                rows = torch.from_numpy(transfer.feature_rows).to(self._device)
                part = features_MD.detach().index_select(0, rows).to(self._empty.dtype)
                self._states[_features(transfer)].outgoing[transfer.tag] = part
            self._start_ready()

    def num_ahead(self) -> int:
        """Return how many micro-batches' features this rank has sent that are still under way."""
        started = self._cursor.started
        return sum(e.kind == "features" and not self._states[e].is_done for e in started)

    def take_features(self, micro_batch: int) -> Tensor:
        """Wait for the features that this rank owns in a micro-batch.

        Returns:
            [M, D] in the order of their positions; [0, D] where the micro-batch has none here.
        """
        receives = self._plan.receives(self._grid.rank, micro_batch)
        exchange = Exchange("features", micro_batch)
        if exchange in self._states:
            self._allow_through(exchange)
        if not receives:
            return self._empty.clone()
        with self._recorder.span("wait", f"features {micro_batch}"):
            parts = [self._take(exchange, transfer) for transfer in receives]
            return torch.cat(parts).index_select(0, self._row_order(receives))

    def return_gradients(self, micro_batch: int, gradients_MD: Tensor) -> None:
        """Send the gradients of a micro-batch's features back, without waiting.

        Args:
            micro_batch: The micro-batch; a rank returns its micro-batches in order.
            gradients_MD: [M, D] in the order in which `take_features` gave the features.
        """
        with self._recorder.span("return", f"micro-batch {micro_batch}"):
            receives = self._plan.receives(self._grid.rank, micro_batch)
            order = self._row_order(receives)
            arrived = torch.empty_like(gradients_MD).index_copy(0, order, gradients_MD)
            parts = arrived.to(self._empty.dtype).split([len(s.positions) for s in receives])
            exchange = Exchange("gradients", micro_batch)
            for transfer, part in zip(receives, parts, strict=True):
                self._states[exchange].outgoing[transfer.tag] = part
            if self._grid.parallel.vision.placement == "dedicated":
                self._allow_through(exchange)

    def finish_decoder(self) -> None:
        """Tell that this rank neither takes features nor returns gradients any more."""
        self._cursor.allow_all()
        self._start_ready()

    def has_gradients(self, chunk: int) -> bool:
        """Tell, without waiting, whether the gradient of a chunk's features is there."""
        exchanges = {_gradients(transfer) for transfer in self._plan.transfers_of(chunk)}
        return all(self._states[exchange].is_done for exchange in exchanges)

    def take_gradients(self, chunk: int) -> Tensor:
        """Wait for the gradient of a chunk's features.

        Args:
            chunk: Index of the chunk in the plan.

        Returns:
            [M, D].
        """
        num_tokens = self._plan.chunks[chunk].num_tokens
        gradient = self._empty.new_zeros(num_tokens, self._empty.shape[1])
        with self._recorder.span("wait", f"gradient of chunk {chunk}"):
            for transfer in self._plan.transfers_of(chunk):
                rows = torch.from_numpy(transfer.feature_rows).to(self._device)
                gradient.index_copy_(0, rows, self._take(_gradients(transfer), transfer))
                # A gradient that has come back shows that its features have left.
                self._let_go(self._states[_features(transfer)])
        return gradient

    def finish(self) -> None:
        """Wait until what this rank sent has left, and check that the whole plan was done."""
        left = self._cursor.waiting
        assert not left, f"rank {self._grid.rank}: {left} of the plan never started"
        for exchange in self._cursor.order:
            state = self._states[exchange]
            state.wait()
            is_taken = not state.arrived and not (state.taken and state.buffers is not None)
            assert is_taken, f"rank {self._grid.rank}: {exchange} was not taken"

    def _state(self, exchange: Exchange) -> _State:
        sends = self._plan.sends(self._grid.rank, exchange.micro_batch)
        receives = self._plan.receives(self._grid.rank, exchange.micro_batch)
        targets = _by_rank(sends, [s.destination for s in sends])
        origins = _by_rank(receives, [s.source for s in receives])
        if exchange.kind == "gradients":
            targets, origins = origins, targets
        ranks = self._grid.transport_ranks
        return _State(
            sent=[s for to_one in targets.values() for s in to_one],
            taken=[s for from_one in origins.values() for s in from_one],
            num_sent=[_num_rows(targets.get(rank, [])) for rank in ranks],
            num_taken=[_num_rows(origins.get(rank, [])) for rank in ranks],
        )

    def _allow_through(self, exchange: Exchange) -> None:
        """Start all exchanges up to this one, which the schedule has reached."""
        self._cursor.allow_through(exchange)
        self._start_ready()
        assert exchange in self._cursor.started, (
            f"rank {self._grid.rank} reached {exchange} before it had its part of "
            f"{self._cursor.waiting[0]}, which stands earlier in the plan's order"
        )

    def _start_ready(self) -> None:
        for exchange in self._cursor.take_ready(self._has_part):
            self._let_go_of_sent()
            self._start(self._states[exchange])

    def _has_part(self, exchange: Exchange) -> bool:
        """Tell whether all rows that this rank sends in an exchange are there."""
        state = self._states[exchange]
        return len(state.outgoing) == len(state.sent)

    def _start(self, state: _State) -> None:
        outgoing = torch.cat([self._empty, *(state.outgoing.pop(s.tag) for s in state.sent)])
        incoming = self._empty.new_empty(sum(state.num_taken), self._empty.shape[1])
        state.buffers, state.has_started = (outgoing, incoming), True
        state.work = dist.all_to_all_single(
            incoming,
            outgoing,
            state.num_taken,
            state.num_sent,
            group=self._grid.transport,
            async_op=True,
        )

    def _let_go_of_sent(self) -> None:
        """Free what has left, so that a step's features never lie on a vision rank together."""
        for exchange in self._cursor.started:
            state = self._states[exchange]
            if state.is_done:
                self._let_go(state)

    def _let_go(self, state: _State) -> None:
        """Free the buffers of an exchange that is done, unless rows in them are to be taken."""
        if state.buffers is not None and not state.taken:
            state.wait()
            state.buffers = None

    def _take(self, exchange: Exchange, transfer: Transfer) -> Tensor:
        state = self._states[exchange]
        if state.buffers is not None:
            state.wait()
            parts = state.buffers[1].split([len(s.positions) for s in state.taken])
            state.arrived = {s.tag: part for s, part in zip(state.taken, parts, strict=True)}
            state.buffers = None
        return state.arrived.pop(transfer.tag)

    def _row_order(self, receives: list[Transfer]) -> Tensor:
        positions = torch.cat([torch.from_numpy(s.positions) for s in receives])
        return positions.argsort().to(self._device)


def _features(transfer: Transfer) -> Exchange:
    return Exchange("features", transfer.micro_batch)


def _gradients(transfer: Transfer) -> Exchange:
    return Exchange("gradients", transfer.micro_batch)


def _by_rank(transfers: list[Transfer], ranks: list[int]) -> dict[int, list[Transfer]]:
    """Sort transfers, which come by tag, to the ranks at their other end, ascending."""
    groups: dict[int, list[Transfer]] = {rank: [] for rank in sorted(set(ranks))}
    for transfer, rank in zip(transfers, ranks, strict=True):
        groups[rank].append(transfer)
    return groups


def _num_rows(transfers: list[Transfer]) -> int:
    return sum(len(transfer.positions) for transfer in transfers)
