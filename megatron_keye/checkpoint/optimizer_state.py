"""Optimizers as a checkpoint holds them: beside each weight, under its name, and always whole.

So any grid finds its part, whether its replicas share the optimizer or each keep all of it.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import (
    MASTER,
    Shard,
    gather_whole,
    is_shared,
    optimizers_of,
    shards_of,
)
from megatron_keye.checkpoint.state import Sharded, data_of
from megatron_keye.optim.optimizer import JointOptimizer

type Place = ShardedTensor | ShardedTensorFactory


def saved_optimizer(joint: JointOptimizer, weights: Sharded) -> Sharded:
    """Return the moments and master weights that this rank writes. All ranks must call it.

    Args:
        joint: Both optimizers of this rank.
        weights: From `weight_state`.
    """
    names = _names(weights)
    state: Sharded = {}
    for optimizer in optimizers_of(joint):
        for shard in gather_whole(optimizer):
            name = names[id(shard.weight)]
            for kind, whole in shard.kept.items():
                state[f"{name}.{kind}"] = _placed(optimizer, shard, weights[name], whole, kind)
    return state


@dataclass(frozen=True)
class WantedOptimizer:
    """What this rank asks of a checkpoint for its optimizers."""

    state: Sharded
    """Whole moments and master weights."""
    parts: tuple[tuple[Shard, Tensor, Tensor], ...]
    """What is kept of a weight, the optimizer's own tensor, and the whole one that comes of the
    checkpoint."""

    @torch.no_grad()
    def keep(self) -> None:
        """Take from whole tensors, once they are filled, what the optimizers keep."""
        for shard, kept, whole in self.parts:
            kept.copy_(shard.part_of(whole).view_as(kept))


def wanted_optimizer(joint: JointOptimizer, weights: Sharded) -> WantedOptimizer:
    """Return what the optimizers need, shared with their memory where they keep all of a weight.

    Weights of which a rank keeps a part, two at most of each optimizer, are read whole.

    Args:
        joint: Both optimizers of this rank.
        weights: From `weight_state`.
    """
    names = _names(weights)
    state: Sharded = {}
    parts: list[tuple[Shard, Tensor, Tensor]] = []
    for optimizer in optimizers_of(joint):
        for shard in shards_of(optimizer):
            name = names[id(shard.weight)]
            for kind, kept in shard.kept.items():
                whole = kept
                if not shard.is_whole:
                    whole = kept.new_empty(shard.weight.numel())
                    parts.append((shard, kept, whole))
                state[f"{name}.{kind}"] = _placed(optimizer, shard, weights[name], whole, kind)
    return WantedOptimizer(state=state, parts=tuple(parts))


def set_optimizer_steps(joint: JointOptimizer, steps: int) -> None:
    """Tell the optimizers how many updates their moments have seen.

    torch counts for each weight; fused ones for each group, which they only begin with a step.
    """
    for optimizer in optimizers_of(joint):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            if not isinstance(inner, torch.optim.Adam):
                group["step"] = steps
                continue
            for parameter in group["params"]:
                inner.state[parameter]["step"] = torch.tensor(float(steps))


@torch.no_grad()
def copy_to_masters(joint: JointOptimizer) -> None:
    """Bring master weights up to date with weights that were loaded without them."""
    for optimizer in optimizers_of(joint):
        for shard in shards_of(optimizer):
            if MASTER in shard.kept:
                master = shard.kept[MASTER]
                master.copy_(shard.part_of(shard.weight).view_as(master))


def _names(weights: Sharded) -> dict[int, str]:
    return {id(tensor): name for name, tensor in data_of(weights).items()}


def _placed(
    optimizer: MegatronOptimizer, shard: Shard, weight: Place, whole: Tensor, kind: str
) -> Place:
    """Place an optimizer's tensor in the whole model as its weight is placed.

    Where replicas share the optimizer, the one that has a weight's beginning counts as the first,
    which writes it.

    Args:
        optimizer: Whose tensor it is.
        shard: What it keeps of the weight.
        weight: As a checkpoint holds it.
        whole: As many elements as the weight.
        kind: Name of the tensor.
    """
    shaped = whole.view(weight.data.shape)
    placed: Place = make_sharded_optimizer_tensor(weight, shaped, prefix=f"optimizer.{kind}")
    if is_shared(optimizer) and shard.elements.start == 0:
        placed = replace(placed, replica_id=(*placed.replica_id[:-1], 0))
    return placed
