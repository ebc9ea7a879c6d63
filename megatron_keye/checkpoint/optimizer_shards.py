# SPDX-License-Identifier: Apache-2.0
"""This rank's shard of each weight's optimizer state: all of it, or the part that it updates.

Megatron's distributed optimizer concatenates all gradients of a data-parallel group and gives each
rank an equal part, regardless of weight boundaries. Most weights thus belong to one rank; the
others are gathered on the rank with their first element. The only file that knows the internals of
Megatron's optimizers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.optim.staged_adamw import MASTER, MOMENTS, StagedAdamW


@dataclass(frozen=True)
class Shard:
    """This rank's optimizer state of one weight."""

    weight: Tensor
    """The whole weight, in the model's type."""
    elements: range
    """Elements of the flattened weight that this rank updates."""
    kept: dict[str, Tensor]
    """Moments and, where the weight is rounded, its master weight, by name; each has as many
    entries as `elements`, in the optimizer's own memory, which may be the machine's."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank updates all of the weight."""
        return len(self.elements) == self.weight.numel()

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's elements of `whole`, a tensor of the weight's size."""
        return whole.flatten()[self.elements.start : self.elements.stop]


def optimizers_of(joint: JointOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield this rank's optimizers that have trainable weights."""
    for optimizer in (joint.decoder, joint.vision):
        parts = [optimizer]
        if isinstance(optimizer, ChainedOptimizer):
            parts = optimizer.chained_optimizers
        yield from (part for part in parts if part is not None and not part.is_stub_optimizer)


def is_sharded(optimizer: MegatronOptimizer) -> bool:
    """Return whether replicas shard an optimizer."""
    return isinstance(optimizer, DistributedOptimizer)


def shards_of(optimizer: MegatronOptimizer) -> Iterator[Shard]:
    """Yield the shards of one optimizer, creating state that does not exist yet."""
    _create_state(optimizer)
    for weight, updated, elements in _updated(optimizer):
        state = optimizer.optimizer.state[updated]
        kept = {name: state[name] for name in (*MOMENTS, MASTER) if name in state}
        if updated.dtype != weight.dtype:
            kept[MASTER] = updated.data
        yield Shard(weight=weight, elements=elements, kept=kept)


def gather_whole(optimizer: MegatronOptimizer) -> Iterator[Shard]:
    """Yield shards of whole weights, each on one rank of the data-parallel group.

    Collective: all ranks must call it and exhaust it. Weights that begin on this rank and end on
    later ones are received from these, into new memory.
    """
    shards = list(shards_of(optimizer))
    yield from (shard for shard in shards if shard.is_whole)
    if isinstance(optimizer, DistributedOptimizer):
        by_weight = {id(shard.weight): shard for shard in shards}
        for weight, holders in _split_weights(optimizer):
            shard = by_weight.get(id(weight))
            if shard is not None:
                whole = _gather_on_first(shard, holders, optimizer.data_parallel_group)
                if whole is not None:
                    yield whole


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set the number of updates that an optimizer's moments have seen, which decides its bias.

    torch counts per weight; fused optimizers per parameter group, from their first step on.
    """
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not isinstance(inner, torch.optim.Adam):
            group["step"] = steps
            continue
        for weight in group["params"]:
            inner.state[weight]["step"] = torch.tensor(float(steps))


def _create_state(optimizer: MegatronOptimizer) -> None:
    """Create moments of 0 for weights that were never updated.

    Megatron leaves out torch's count of updates, without which a weight that has moments fails at
    its next update.
    """
    inner = optimizer.optimizer
    if isinstance(inner, StagedAdamW):
        return  # Has it from the beginning.
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam):
        for weight in optimizer.get_parameters():
            inner.state[weight].setdefault("step", torch.tensor(0.0))


def _updated(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, range]]:
    """Yield each weight, the tensor updated in its place, and which elements that has."""
    for weight, updated in _pairs(optimizer):
        elements = range(weight.numel())
        if isinstance(optimizer, DistributedOptimizer):
            part = optimizer._get_model_param_range_map(weight)["param"]
            elements = range(part.start, part.end)
        yield weight, updated, elements


def _pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each weight that this rank updates a part of, with the tensor that it updates."""
    if isinstance(optimizer, DistributedOptimizer):
        has_masters = isinstance(optimizer.optimizer, StagedAdamW)
        rounded = "shard_float16_groups" if has_masters else "shard_fp32_from_float16_groups"
        kinds = [
            (optimizer.model_float16_groups, getattr(optimizer, rounded)),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    elif hasattr(optimizer, "float16_groups"):
        kinds = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    else:
        kinds = [([optimizer.get_parameters()], [optimizer.get_parameters()])]
    for all_weights, all_updated in kinds:
        for weights, updated in zip(all_weights, all_updated, strict=True):
            yield from zip(weights, updated, strict=True)


def _split_weights(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, dict[int, range]]]:
    """Yield the weights that several ranks keep parts of, with the elements of each rank.

    The same on all ranks of the data-parallel group.
    """
    num_ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for weight, (start, stop, bucket_number) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_number]
            size = bucket.grad_data.numel() // num_ranks
            first = (start - bucket.offset) // size
            last = (stop - 1 - bucket.offset) // size
            bounds = [bucket.offset + rank * size - start for rank in range(first, last + 2)]
            bounds[0], bounds[-1] = 0, stop - start
            parts = zip(range(first, last + 1), bounds[:-1], bounds[1:], strict=True)
            if first < last:
                yield weight, {rank: range(a, b) for rank, a, b in parts}


def _gather_on_first(
    shard: Shard, holders: dict[int, range], group: dist.ProcessGroup
) -> Shard | None:
    """Send this rank's part of a weight to the first holder, which returns the whole."""
    first = min(holders)
    if group.rank() != first:
        parts = [part.flatten().to(shard.weight.device) for part in shard.kept.values()]
        operations = [dist.P2POp(dist.isend, p, group=group, group_peer=first) for p in parts]
        _finish(operations)
        return None
    kept: dict[str, Tensor] = {}
    operations = []
    for name, mine in shard.kept.items():
        whole = mine.new_empty(shard.weight.numel(), device=shard.weight.device)
        whole[: len(shard.elements)] = mine.flatten()
        operations += [
            dist.P2POp(dist.irecv, whole[part.start : part.stop], group=group, group_peer=rank)
            for rank, part in holders.items()
            if rank != first
        ]
        kept[name] = whole
    _finish(operations)
    return Shard(weight=shard.weight, elements=range(shard.weight.numel()), kept=kept)


def _finish(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
