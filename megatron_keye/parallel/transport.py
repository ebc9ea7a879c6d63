"""Carries features from vision ranks to the decoder ranks that own them, and gradients back.

Messages are planned (plan.py), so both ends know each length beforehand; only owned rows travel,
uneven counts and any ratio of ranks are ordinary cases, and a rank that is both ends copies.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.plan import Shipment, StepPlan


@dataclass(frozen=True)
class _Arrival:
    """A message on its way: the buffer it fills, and what to wait for."""

    buffer: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.buffer


class FeatureTransport:
    """The messages of one step. Make a new one for each step."""

    def __init__(
        self, plan: StepPlan, grid: Grid, *, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Post the receives of all features that this rank will take.

        Args:
            plan: The step's plan.
            grid: Groups of the two directions, and this rank.
            width: Width D of a feature.
            dtype: Type in which features and gradients travel.
            device: Where buffers live.
        """
        self._plan, self._grid = plan, grid
        self._width, self._dtype, self._device = width, dtype, device
        self._sent: list[tuple[dist.Work, Tensor]] = []
        mine = [s for s in plan.shipments if s.destination == grid.rank != s.source]
        self._features = {s.tag: self._receive(s, s.source, grid.features) for s in mine}
        self._gradients: dict[int, _Arrival] = {}

    def send_features(self, chunk: int, features_MD: Tensor) -> None:
        """Send a chunk's features to their owners, without waiting.

        Args:
            chunk: Index of the chunk in the plan.
            features_MD: [M, D], all merged tokens of the chunk.
        """
        for shipment in self._plan.shipments_of(chunk):
            rows = torch.from_numpy(shipment.feature_rows).to(self._device)
            part = features_MD.detach().index_select(0, rows).to(self._dtype)
            self._send(part, shipment, shipment.destination, self._grid.features, self._features)

    def take_features(self, micro_batch: int) -> Tensor:
        """Wait for the features that this rank owns in a micro-batch.

        Returns:
            [M, D] in the order of their positions; [0, D] where the micro-batch has none here.
        """
        arrivals = self._plan.arrivals(self._grid.rank, micro_batch)
        if not arrivals:
            return torch.empty(0, self._width, dtype=self._dtype, device=self._device)
        parts = [self._features.pop(shipment.tag).wait() for shipment in arrivals]
        return torch.cat(parts).index_select(0, self._order(arrivals))

    def return_gradients(self, micro_batch: int, gradients_MD: Tensor) -> None:
        """Send the gradients of a micro-batch's features back, without waiting.

        Args:
            micro_batch: The micro-batch.
            gradients_MD: [M, D] in the order in which `take_features` gave the features.
        """
        arrivals = self._plan.arrivals(self._grid.rank, micro_batch)
        arrived = torch.empty_like(gradients_MD).index_copy(0, self._order(arrivals), gradients_MD)
        parts = arrived.split([len(shipment.positions) for shipment in arrivals])
        for shipment, part in zip(arrivals, parts, strict=True):
            gradient = part.to(self._dtype).contiguous()
            self._send(gradient, shipment, shipment.source, self._grid.gradients, self._gradients)

    def expect_gradients(self) -> None:
        """Post the receives of all gradients that will come back to this vision rank."""
        mine = [s for s in self._plan.shipments if s.source == self._grid.rank != s.destination]
        # Each decoder rank finishes its micro-batches in order, and NCCL pairs messages by order.
        for shipment in sorted(mine, key=lambda s: (s.micro_batch, s.tag)):
            self._gradients[shipment.tag] = self._receive(
                shipment, shipment.destination, self._grid.gradients
            )

    def take_gradients(self, chunk: int, num_tokens: int) -> Tensor:
        """Wait for the gradient of a chunk's features.

        Args:
            chunk: Index of the chunk in the plan.
            num_tokens: Merged tokens M of the chunk.

        Returns:
            [M, D].
        """
        gradient = torch.zeros(num_tokens, self._width, dtype=self._dtype, device=self._device)
        for shipment in self._plan.shipments_of(chunk):
            rows = torch.from_numpy(shipment.feature_rows).to(self._device)
            gradient.index_copy_(0, rows, self._gradients.pop(shipment.tag).wait())
        return gradient

    def finish(self) -> None:
        """Wait until all that this rank sent has left, so that its buffers may be freed."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        left = [*self._features, *self._gradients]
        assert not left, f"rank {self._grid.rank}: messages {left} of the plan were never taken"

    def _order(self, arrivals: list[Shipment]) -> Tensor:
        positions = torch.cat([torch.from_numpy(s.positions) for s in arrivals])
        return positions.argsort().to(self._device)

    def _receive(self, shipment: Shipment, source: int, group: dist.ProcessGroup) -> _Arrival:
        size = (len(shipment.positions), self._width)
        buffer = torch.empty(size, dtype=self._dtype, device=self._device)
        return _Arrival(buffer, dist.irecv(buffer, source, group=group, tag=shipment.tag))

    def _send(
        self,
        part: Tensor,
        shipment: Shipment,
        destination: int,
        group: dist.ProcessGroup,
        own: dict[int, _Arrival],
    ) -> None:
        if destination == self._grid.rank:
            own[shipment.tag] = _Arrival(part, None)
            return
        work = dist.isend(part, destination, group=group, tag=shipment.tag)
        assert work is not None, "isend gives no work only on ranks outside its group"
        self._sent.append((work, part))


