"""Carries features from vision ranks to the decoder ranks that own them, and gradients back.

One uneven all-to-all a micro-batch and direction, whose counts both ends take from the plan, so
only owned rows travel and any ratio of ranks is an ordinary case. Single messages would not do:
NCCL runs those of one group in order and sets up each pair of ranks with both present, so ranks
that are at different points of their schedules wait for each other for ever.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.plan import Shipment, StepPlan


class _Direction:
    """The all-to-alls of one direction, in the order of micro-batches on every rank."""

    def __init__(
        self,
        plan: StepPlan,
        grid: Grid,
        group: dist.ProcessGroup,
        *,
        source: Callable[[Shipment], int],
        destination: Callable[[Shipment], int],
        empty: Tensor,
    ) -> None:
        self._plan, self._ranks, self._group, self._rank = (
            plan,
            grid.transport_ranks,
            group,
            grid.rank,
        )
        self._source, self._destination, self._empty = source, destination, empty
        self._outgoing: dict[int, Tensor] = {}
        self._incoming: dict[int, tuple[Tensor, dist.Work, list[Shipment]]] = {}
        self._arrived: dict[int, Tensor] = {}
        self._started: list[tuple[dist.Work, Tensor]] = []
        self._waiting = list(plan.micro_batches)

    def put(self, shipment: Shipment, rows: Tensor) -> None:
        """Keep rows until their micro-batch's turn."""
        self._outgoing[shipment.tag] = rows.to(self._empty.dtype)

    def exchange_through(self, micro_batch: int) -> None:
        """Start the exchanges of all micro-batches up to this one, without waiting."""
        while self._waiting and self._waiting[0] <= micro_batch:
            self._exchange(self._waiting.pop(0))

    def exchange_rest(self) -> None:
        """Start the exchanges that are left."""
        if self._waiting:
            self.exchange_through(self._waiting[-1])

    def take(self, shipment: Shipment) -> Tensor:
        """Wait for the rows of a shipment to this rank and hand them over."""
        self.exchange_through(shipment.micro_batch)
        if shipment.tag not in self._arrived:
            buffer, work, shipments = self._incoming.pop(shipment.micro_batch)
            work.wait()
            parts = buffer.split([len(s.positions) for s in shipments])
            self._arrived |= {s.tag: part for s, part in zip(shipments, parts, strict=True)}
        return self._arrived.pop(shipment.tag)

    def finish(self) -> None:
        """Wait until what was sent has left, and check that all of the plan was sent and taken."""
        for work, _ in self._started:
            work.wait()
        left = [*self._waiting, *self._outgoing, *self._incoming, *self._arrived]
        assert not left, f"rank {self._rank}: messages {left} of the plan were never exchanged"

    def _exchange(self, micro_batch: int) -> None:
        mine = [s for s in self._plan.shipments if s.micro_batch == micro_batch]
        sent = [[s for s in mine if self._goes(s, self._rank, r)] for r in self._ranks]
        taken = [[s for s in mine if self._goes(s, r, self._rank)] for r in self._ranks]
        parts = [self._outgoing.pop(s.tag) for to_one in sent for s in to_one]
        counts = [[sum(len(s.positions) for s in part) for part in side] for side in (sent, taken)]
        buffer = self._empty.new_empty(sum(counts[1]), self._empty.shape[1])
        outgoing = torch.cat([self._empty, *parts])
        work = dist.all_to_all_single(
            buffer, outgoing, counts[1], counts[0], group=self._group, async_op=True
        )
        self._started.append((work, outgoing))
        shipments = [s for from_one in taken for s in from_one]
        if shipments:
            self._incoming[micro_batch] = (buffer, work, shipments)

    def _goes(self, shipment: Shipment, source: int, destination: int) -> bool:
        return self._source(shipment) == source and self._destination(shipment) == destination


class FeatureTransport:
    """The messages of one step. Make a new one for each step."""

    def __init__(
        self, plan: StepPlan, grid: Grid, *, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Prepare both directions.

        Args:
            plan: The step's plan.
            grid: Groups of the two directions, and this rank.
            width: Width D of a feature.
            dtype: Type in which features and gradients travel.
            device: Where buffers live.
        """
        self._plan, self._grid, self._device = plan, grid, device
        self._unsent = plan.chunks_of(grid.rank)
        self._empty = torch.empty(0, width, dtype=dtype, device=device)
        self._features = _Direction(
            plan,
            grid,
            grid.features,
            source=lambda s: s.source,
            destination=lambda s: s.destination,
            empty=self._empty,
        )
        self._gradients = _Direction(
            plan,
            grid,
            grid.gradients,
            source=lambda s: s.destination,
            destination=lambda s: s.source,
            empty=self._empty,
        )

    def send_features(self, chunk: int, features_MD: Tensor) -> None:
        """Send a chunk's features to their owners, without waiting.

        A micro-batch goes out when the last of this rank's chunks that feed it is there.

        Args:
            chunk: Index of the chunk in the plan; a rank sends its chunks in order.
            features_MD: [M, D], all merged tokens of the chunk.
        """
        for shipment in self._plan.shipments_of(chunk):
            rows = torch.from_numpy(shipment.feature_rows).to(self._device)
            self._features.put(shipment, features_MD.detach().index_select(0, rows))
        self._unsent.remove(chunk)
        needed = [s.micro_batch for c in self._unsent for s in self._plan.shipments_of(c)]
        if needed:
            self._features.exchange_through(min(needed) - 1)

    def finish_features(self) -> None:
        """Tell that this rank has no more features to send."""
        self._features.exchange_rest()

    def take_features(self, micro_batch: int) -> Tensor:
        """Wait for the features that this rank owns in a micro-batch.

        Returns:
            [M, D] in the order of their positions; [0, D] where the micro-batch has none here.
        """
        self._features.exchange_through(micro_batch)
        arrivals = self._plan.arrivals(self._grid.rank, micro_batch)
        if not arrivals:
            return self._empty.clone()
        parts = [self._features.take(shipment) for shipment in arrivals]
        return torch.cat(parts).index_select(0, self._order(arrivals))

    def return_gradients(self, micro_batch: int, gradients_MD: Tensor) -> None:
        """Send the gradients of a micro-batch's features back, without waiting.

        Args:
            micro_batch: The micro-batch; a rank returns its micro-batches in order.
            gradients_MD: [M, D] in the order in which `take_features` gave the features.
        """
        arrivals = self._plan.arrivals(self._grid.rank, micro_batch)
        arrived = torch.empty_like(gradients_MD).index_copy(0, self._order(arrivals), gradients_MD)
        parts = arrived.split([len(shipment.positions) for shipment in arrivals])
        for shipment, part in zip(arrivals, parts, strict=True):
            self._gradients.put(shipment, part)
        self._gradients.exchange_through(micro_batch)

    def finish_gradients(self) -> None:
        """Tell that this rank has no more gradients to return."""
        self._gradients.exchange_rest()

    def take_gradients(self, chunk: int, num_tokens: int) -> Tensor:
        """Wait for the gradient of a chunk's features.

        Args:
            chunk: Index of the chunk in the plan.
            num_tokens: Merged tokens M of the chunk.

        Returns:
            [M, D].
        """
        gradient = self._empty.new_zeros(num_tokens, self._empty.shape[1])
        for shipment in self._plan.shipments_of(chunk):
            rows = torch.from_numpy(shipment.feature_rows).to(self._device)
            gradient.index_copy_(0, rows, self._gradients.take(shipment))
        return gradient

    def finish(self, *, gradients_returned: bool) -> None:
        """Wait until what this rank sent has left, and check that the whole plan was carried out.

        Args:
            gradients_returned: Whether gradients were part of it.
        """
        self._features.finish()
        if gradients_returned:
            self._gradients.finish()

    def _order(self, arrivals: list[Shipment]) -> Tensor:
        positions = torch.cat([torch.from_numpy(s.positions) for s in arrivals])
        return positions.argsort().to(self._device)
