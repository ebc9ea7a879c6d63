"""Optimizers as a checkpoint holds them: beside each weight, under its name, and always whole.

So any grid finds its part, whether its replicas share the optimizer or each keep all of it.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import (
    MASTER,
    is_shared,
    optimizers_of,
    put_together,
    shards_of,
)
from megatron_keye.checkpoint.state import Sharded, data_of
from megatron_keye.training.optimizer import JointOptimizer

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
        for shard in put_together(optimizer):
            name = names[id(shard.weight)]
            for kind, whole in shard.kept.items():
                sharded = _sharded(weights[name], whole, kind)
                state[f"{name}.{kind}"] = _first(sharded) if is_shared(optimizer) else sharded
    return state


@dataclass(frozen=True)
class WantedOptimizer:
    """What this rank asks of a checkpoint for its optimizers."""

    state: Sharded
    """Whole moments and master weights."""
    parts: tuple[tuple[Tensor, Tensor, range], ...]
    """Tensors of an optimizer, the whole tensors that come of the checkpoint, and which of their
    elements the optimizer keeps."""

    @torch.no_grad()
    def keep(self) -> None:
        """Take from whole tensors, once they are filled, what the optimizers keep."""
        for kept, whole, elements in self.parts:
            kept.copy_(whole.flatten()[elements.start : elements.stop].view_as(kept))


def wanted_optimizer(joint: JointOptimizer, weights: Sharded) -> WantedOptimizer:
    """Return what the optimizers need, shared with their memory where they keep all of a weight.

    Weights of which a rank keeps a part, two at most of each optimizer, are read whole.

    Args:
        joint: Both optimizers of this rank.
        weights: From `weight_state`.
    """
    names = _names(weights)
    state: Sharded = {}
    parts: list[tuple[Tensor, Tensor, range]] = []
    for optimizer in optimizers_of(joint):
        for shard in shards_of(optimizer):
            name = names[id(shard.weight)]
            for kind, kept in shard.kept.items():
                whole = kept
                if not shard.is_whole:
                    whole = kept.new_empty(shard.weight.numel())
                    parts.append((kept, whole, shard.elements))
                sharded = _sharded(weights[name], whole, kind)
                begins_here = is_shared(optimizer) and shard.elements.start == 0
                state[f"{name}.{kind}"] = _first(sharded) if begins_here else sharded
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
                master, part = shard.kept[MASTER], shard.elements
                master.copy_(shard.weight.flatten()[part.start : part.stop].view_as(master))


def _names(weights: Sharded) -> dict[int, str]:
    return {id(tensor): name for name, tensor in data_of(weights).items()}


def _sharded(weight: Place, tensor: Tensor, kind: str) -> Place:
    """Place an optimizer's tensor in the whole model as its weight is placed.

    Args:
        weight: As a checkpoint holds it.
        tensor: As many elements as the weight.
        kind: Its name.
    """
    placed = tensor.view(weight.data.shape)
    sharded: Place = make_sharded_optimizer_tensor(weight, placed, prefix=f"optimizer.{kind}")
    return sharded


def _first(sharded: Place) -> Place:
    """Make this replica the first one, which is asked for, although others keep nothing of it."""
    return replace(sharded, replica_id=(*sharded.replica_id[:-1], 0))
