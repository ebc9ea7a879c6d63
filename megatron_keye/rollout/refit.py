# SPDX-License-Identifier: Apache-2.0
"""Gives the weights of a model that learns to one that generates with them on another grid.

A rank shares with the learning model the memory of each weight that both have alike; the rest has
memory while answers are wanted, and comes from the ranks that learn it. Nothing is computed, so
the weights are those that a checkpoint between the two grids would give, bit for bit.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_keye.checkpoint.state import Sharded, shards_of, weight_state
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.rollout.weight_moves import Box, Move, plan_moves, plan_rounds

_ROUND_BYTES = 2**28
"""Bytes that a rank sends at once, and receives; larger messages are no faster. They also bound
what the exchange needs beside the weights."""
_ALIGNMENT_BYTES = 16
"""Weights of several types lie behind one another in a message."""


@dataclass(frozen=True)
class _Piece:
    """A part of this rank's weights that travels."""

    peer: int
    """Rank that it comes from or goes to."""
    data: Tensor
    """A view of the weight."""


@dataclass(frozen=True)
class _Exchange:
    """What this rank sends and receives in one round, in the order of the ranks."""

    sent: list[_Piece]
    received: list[_Piece]


class Refit:
    """Keeps the decoder of a generating model at the weights of the one that learns."""

    def __init__(
        self,
        learning: tuple[KeyeModel, Grid],
        generating: tuple[KeyeModel, Grid],
        device: torch.device,
    ) -> None:
        """Plan once for all updates. Collective: all ranks must call it.

        The generating model has no memory afterwards but what both share.

        Args:
            learning: This rank's modules and groups as it trains.
            generating: The same as it generates; these weights are filled.
            device: Where this rank computes.
        """
        self._device = device
        self.seconds = 0.0
        """Of the last renewal."""
        own, missing = weight_state(*learning), weight_state(*generating)
        _check_whole(generating[0], missing)
        _share_memory(own, missing)
        # Linears of some kinds have one memory for several weights.
        storages = {w.data.data_ptr(): w.data.untyped_storage() for w in missing.values()}
        self._memory = [(storage, storage.nbytes()) for storage in storages.values()]
        held, wanted = shards_of(own), shards_of(missing)
        boxes = list(
            zip(*_gathered((list(map(_box, held)), list(map(_box, wanted)))), strict=True)
        )
        moves, rank = plan_moves(*boxes), dist.get_rank()
        self.num_bytes = sum(m.box.num_bytes for m in moves if m.source != m.target)
        """That all ranks send together in a renewal."""
        self._copies = [
            (_view(held[move.held], move.box), _view(wanted[move.wanted], move.box))
            for move in moves
            if move.source == move.target == rank
        ]
        self._exchanges = [
            _exchange(of_round, rank, held, wanted)
            for of_round in plan_rounds(moves, dist.get_world_size(), _ROUND_BYTES)
        ]
        self._is_current = False
        self.release()

    def note_update(self) -> None:
        """Note that the learning model has new weights."""
        self._is_current = False

    def renew(self) -> None:
        """Bring the generating model to the newest weights, if it has others. Collective."""
        if self._is_current:
            return
        began = time.perf_counter()
        for storage, num_bytes in self._memory:
            storage.resize_(num_bytes)
        with torch.no_grad():
            for origin, copy in self._copies:
                copy.copy_(origin)
            for each in self._exchanges:
                _run(each, self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds, self._is_current = time.perf_counter() - began, True

    def release(self) -> None:
        """Give the memory of what is not shared to whoever needs it, until the next renewal."""
        self._is_current = False
        # Tensors that are views of it stay, and have it again later.
        for storage, _ in self._memory:
            storage.resize_(0)


def _check_whole(model: KeyeModel, state: Sharded) -> None:
    """Check that a model has no weight without a name in the whole model."""
    named = {weight.data.data_ptr() for weight in state.values()}
    for module in model.wrapped():
        for name, weight in module.named_parameters():
            assert weight.data_ptr() in named, f"{name} has no name by which it could be brought"


def _share_memory(own: Sharded, missing: Sharded) -> None:
    """Let weights have the memory of those that are the same part of the model on this rank.

    Args:
        own: Weights that learn.
        missing: Weights that generate; those that are shared are taken out.
    """
    by_part = {_part(weight): weight for weight in own.values()}
    for name, weight in list(missing.items()):
        alike = by_part.get(_part(weight))
        if alike is not None:
            weight.data.data = alike.data.detach()
            del missing[name]


def _part(weight: ShardedTensor | ShardedTensorFactory) -> tuple[Box, ...]:
    """Return which part of the whole model a weight is."""
    return tuple(map(_box, shards_of({"": weight})))


def _gathered[Content](content: Content) -> list[Content]:
    """Return what each rank has, by rank."""
    found = [content] * dist.get_world_size()
    dist.all_gather_object(found, content)
    return found


def _box(shard: ShardedTensor) -> Box:
    """Return which part of the whole model a shard is."""
    first = shard.prepend_axis_num
    place = ",".join(map(str, shard.global_offset[:first]))
    return Box(
        name=f"{shard.key}[{place}]",
        offset=tuple(shard.global_offset[first:]),
        shape=tuple(shard.local_shape),
        element_bytes=shard.dtype.itemsize,
    )


def _view(shard: ShardedTensor, box: Box) -> Tensor:
    """Return a part of a shard, as a view."""
    assert shard.data is not None, "weights have data"
    view: Tensor = shard.data.detach()[box.within(_box(shard))]
    return view


def _exchange(
    moves: Sequence[Move], rank: int, held: list[ShardedTensor], wanted: list[ShardedTensor]
) -> _Exchange:
    """Return what one rank does in a round."""
    sent = [_Piece(m.target, _view(held[m.held], m.box)) for m in moves if m.source == rank]
    received = [
        _Piece(m.source, _view(wanted[m.wanted], m.box)) for m in moves if m.target == rank
    ]
    # The order within two ranks is that of the plan, on both.
    return _Exchange(*(sorted(each, key=lambda piece: piece.peer) for each in (sent, received)))


def _run(exchange: _Exchange, device: torch.device) -> None:
    """Send and receive. Collective."""
    sent = torch.empty(sum(_spans(exchange.sent)), dtype=torch.uint8, device=device)
    received = sent.new_empty(sum(_spans(exchange.received)))
    for piece, part in _parts(exchange.sent, sent):
        part.copy_(piece.data)
    dist.all_to_all_single(
        received, sent, _bytes_by_rank(exchange.received), _bytes_by_rank(exchange.sent)
    )
    for piece, part in _parts(exchange.received, received):
        piece.data.copy_(part)


def _parts(pieces: Sequence[_Piece], message: Tensor) -> Iterable[tuple[_Piece, Tensor]]:
    """Yield each piece with its part of a message, in its type and shape."""
    for piece, span in zip(pieces, message.split(_spans(pieces)), strict=True):
        yield piece, span[: piece.data.nbytes].view(piece.data.dtype).view(piece.data.shape)


def _spans(pieces: Sequence[_Piece]) -> list[int]:
    """Return the bytes that each piece takes in a message."""
    return [-(-piece.data.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for piece in pieces]


def _bytes_by_rank(pieces: Sequence[_Piece]) -> list[int]:
    counts = [0] * dist.get_world_size()
    for piece, span in zip(pieces, _spans(pieces), strict=True):
        counts[piece.peer] += span
    return counts
