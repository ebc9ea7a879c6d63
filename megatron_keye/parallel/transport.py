# SPDX-License-Identifier: Apache-2.0
"""Sends features from vision ranks to the decoder ranks that own them, and gradients back.

One uneven all-to-all per micro-batch and direction, with counts from the plan, so that only owned
rows are sent and any ratio of vision to decoder ranks works. Point-to-point messages deadlock:
NCCL runs those of one group in order and connects two ranks only when both call, so ranks at
different points of their schedules would wait for each other for ever. All ranks start the
exchanges in the plan's order, which `plan/order.py` shows to be free of deadlock.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import ExchangeGroup, Grid
from megatron_keye.plan.cursor import ExchangeCursor
from megatron_keye.plan.order import Exchange
from megatron_keye.plan.places import is_encoded_by_decoder
from megatron_keye.plan.step import StepPlan, Transfer


@dataclass
class _State:
    """One exchange on this rank."""

    sends: list[Transfer]
    """By destination, then by tag, as on the receiving rank."""
    receives: list[Transfer]
    """By source, then by tag."""
    num_sent: list[int]
    """Rows to each rank of the group."""
    num_received: list[int]
    """Rows from each rank of the group."""
    outgoing: dict[int, Tensor] = field(default_factory=dict)
    """Rows to send by tag, until the exchange starts."""
    has_started: bool = False
    """Whether this rank has started it."""
    work: dist.Work | None = None
    """Handle, from the start until it is waited for."""
    buffers: tuple[Tensor, Tensor] | None = None
    """All sent and all received rows, until the exchange completes."""
    arrived: dict[int, Tensor] = field(default_factory=dict)
    """Received rows by tag, until they are taken."""

    @property
    def is_done(self) -> bool:
        """Whether the exchange has completed."""
        return self.has_started and (self.work is None or self.work.is_completed())

    def wait(self) -> None:
        """Wait until the exchange completes, and drop torch's references to its buffers."""
        assert self.has_started, "only a started exchange can be waited for"
        if self.work is not None:
            self.work.wait()
            self.work = None


class FeatureTransport:
    """The exchanges of one step. Make a new one for each step."""

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
            grid: This rank and the groups of its exchanges.
            recorder: Records when this rank sends and waits.
            width: Width D of a feature.
            dtype: Type in which features and gradients are sent.
            device: Device of the buffers.
        """
        self._plan, self._grid, self._recorder, self._device = plan, grid, recorder, device
        self._empty = torch.empty(0, width, dtype=dtype, device=device)
        self._states = {exchange: self._state(exchange) for exchange in plan.exchanges}
        self._cursor = ExchangeCursor(
            plan.exchanges,
            grid.parallel,
            grid.rank,
            num_micro_batches=plan.num_micro_batches,
        )

    def start(self) -> None:
        """Start the exchanges that are allowed and to which this rank sends nothing."""
        self._start_ready()

    def send_features(self, chunk: int, features_MD: Tensor) -> None:
        """Send a chunk's features to their owners, without waiting.

        A micro-batch's exchange starts with the last of this rank's chunks that it needs.

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
        """Return the number of micro-batches whose features are sent but not yet received."""
        started = self._cursor.started
        return sum(e.kind == "features" and not self._states[e].is_done for e in started)

    def take_features(self, micro_batch: int) -> Tensor:
        """Wait for the features that this rank owns in a micro-batch.

        Returns:
            [M, D] in the order of their positions; [0, D] where this rank owns none.
        """
        receives = self._plan.receives(self._grid.rank, micro_batch)
        exchange = Exchange("features", micro_batch)
        if exchange in self._states:
            self._allow_through(exchange)
        if not receives:
            return self._empty.clone()
        with self._recorder.span("wait", f"features of micro-batch {micro_batch}"):
            parts = [self._take(exchange, transfer) for transfer in receives]
            return torch.cat(parts).index_select(0, self._row_order(receives))

    def return_gradients(self, micro_batch: int, gradients_MD: Tensor) -> None:
        """Send the gradients of a micro-batch's features back, without waiting.

        Args:
            micro_batch: Index of the micro-batch; a rank returns its micro-batches in order, also
                those without pictures.
            gradients_MD: [M, D] in the order of `take_features`.
        """
        exchange = Exchange("gradients", micro_batch)
        if exchange not in self._states:
            return
        with self._recorder.span("return", f"micro-batch {micro_batch}"):
            receives = self._plan.receives(self._grid.rank, micro_batch)
            if receives:
                order = self._row_order(receives)
                received = torch.empty_like(gradients_MD).index_copy(0, order, gradients_MD)
                parts = received.to(self._empty.dtype).split([len(t.positions) for t in receives])
                for transfer, part in zip(receives, parts, strict=True):
                    self._states[exchange].outgoing[transfer.tag] = part
            if not self._is_around(micro_batch):
                self._allow_through(exchange)

    def finish_decoder(self) -> None:
        """Start the remaining exchanges, since this rank's decoder has finished."""
        self._cursor.allow_all()
        self._start_ready()

    def has_gradients(self, chunk: int) -> bool:
        """Return, without waiting, whether the gradient of a chunk's features has arrived."""
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
                # A gradient that has arrived shows that its features were received.
                self._free(self._states[_features(transfer)])
        return gradient

    def finish(self) -> None:
        """Wait for all exchanges, and check that each was started and its rows taken."""
        pending = self._cursor.pending
        assert not pending, f"rank {self._grid.rank}: {pending} of the plan never started"
        for exchange in self._cursor.order:
            state = self._states[exchange]
            state.wait()
            is_taken = not state.arrived and not (state.receives and state.buffers is not None)
            assert is_taken, f"rank {self._grid.rank}: rows of {exchange} were not taken"

    def _state(self, exchange: Exchange) -> _State:
        sends = self._plan.sends(self._grid.rank, exchange.micro_batch)
        receives = self._plan.receives(self._grid.rank, exchange.micro_batch)
        outgoing = _by_rank(sends, [t.destination for t in sends])
        incoming = _by_rank(receives, [t.source for t in receives])
        if exchange.kind == "gradients":
            outgoing, incoming = incoming, outgoing
        ranks = self._group_of(exchange).ranks
        return _State(
            sends=[t for transfers in outgoing.values() for t in transfers],
            receives=[t for transfers in incoming.values() for t in transfers],
            num_sent=[_num_rows(outgoing.get(rank, [])) for rank in ranks],
            num_received=[_num_rows(incoming.get(rank, [])) for rank in ranks],
        )

    def _is_around(self, micro_batch: int) -> bool:
        """Return whether the decoder's ranks encode a micro-batch, around the decoder."""
        return is_encoded_by_decoder(
            self._grid.parallel.vision, micro_batch, self._plan.num_micro_batches
        )

    def _group_of(self, exchange: Exchange) -> ExchangeGroup:
        is_around = self._is_around(exchange.micro_batch)
        group = self._grid.around if is_around else self._grid.beside
        assert group is not None, f"no rank encodes for {exchange}"
        return group

    def _allow_through(self, exchange: Exchange) -> None:
        """Start all exchanges up to and with this one, which the schedule has reached."""
        self._cursor.allow_through(exchange)
        self._start_ready()
        assert exchange in self._cursor.started, (
            f"rank {self._grid.rank} reached {exchange} before it had its rows of "
            f"{self._cursor.pending[0]}, which comes earlier in the plan's order"
        )

    def _start_ready(self) -> None:
        for exchange in self._cursor.take_ready(self._is_ready):
            self._free_sent()
            self._start(self._states[exchange], self._group_of(exchange).group)

    def _is_ready(self, exchange: Exchange) -> bool:
        """Return whether this rank has all rows that it sends in an exchange."""
        state = self._states[exchange]
        return len(state.outgoing) == len(state.sends)

    def _start(self, state: _State, group: dist.ProcessGroup) -> None:
        outgoing = torch.cat([self._empty, *(state.outgoing.pop(t.tag) for t in state.sends)])
        incoming = self._empty.new_empty(sum(state.num_received), self._empty.shape[1])
        state.buffers, state.has_started = (outgoing, incoming), True
        state.work = dist.all_to_all_single(
            incoming,
            outgoing,
            state.num_received,
            state.num_sent,
            group=group,
            async_op=True,
        )

    def _free_sent(self) -> None:
        """Free completed exchanges, so that a vision rank never holds all features of a step."""
        for exchange in self._cursor.started:
            state = self._states[exchange]
            if state.is_done:
                self._free(state)

    def _free(self, state: _State) -> None:
        """Free the buffers of a completed exchange from which this rank takes no rows."""
        if state.buffers is not None and not state.receives:
            state.wait()
            state.buffers = None

    def _take(self, exchange: Exchange, transfer: Transfer) -> Tensor:
        state = self._states[exchange]
        if state.buffers is not None:
            state.wait()
            parts = state.buffers[1].split([len(t.positions) for t in state.receives])
            state.arrived = {t.tag: part for t, part in zip(state.receives, parts, strict=True)}
            state.buffers = None
        return state.arrived.pop(transfer.tag)

    def _row_order(self, receives: list[Transfer]) -> Tensor:
        positions = torch.cat([torch.from_numpy(t.positions) for t in receives])
        return positions.argsort().to(self._device)


def _features(transfer: Transfer) -> Exchange:
    return Exchange("features", transfer.micro_batch)


def _gradients(transfer: Transfer) -> Exchange:
    return Exchange("gradients", transfer.micro_batch)


def _by_rank(transfers: list[Transfer], ranks: list[int]) -> dict[int, list[Transfer]]:
    """Group transfers by the rank at their other end, ranks ascending, each group by tag."""
    groups: dict[int, list[Transfer]] = {rank: [] for rank in sorted(set(ranks))}
    for transfer, rank in zip(transfers, ranks, strict=True):
        groups[rank].append(transfer)
    return groups


def _num_rows(transfers: list[Transfer]) -> int:
    return sum(len(transfer.positions) for transfer in transfers)
