# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in checkpoints: whole tensors under the names of their weights.

Any grid can load them, whether its replicas shard the optimizer or each keep all of it.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import (
    Shard,
    gather_whole,
    is_sharded,
    optimizers_of,
    set_steps,
    shards_of,
)
from megatron_keye.checkpoint.state import Sharded, data_of
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.optim.staged_adamw import MASTER

type ShardedEntry = ShardedTensor | ShardedTensorFactory


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
                state[f"{name}.{kind}"] = _sharded_like(
                    optimizer, shard, weights[name], whole, kind
                )
    return state


@dataclass(frozen=True)
class WantedOptimizer:
    """What this rank loads for its optimizers."""

    state: Sharded
    """Whole moments and master weights."""
    parts: tuple[tuple[Shard, Tensor, Tensor], ...]
    """Shard of a weight, the optimizer's own tensor, and the whole one that is loaded."""

    @torch.no_grad()
    def copy_parts(self) -> None:
        """Copy this rank's parts of the loaded whole tensors into the optimizers."""
        for shard, kept, whole in self.parts:
            kept.copy_(shard.part_of(whole).view_as(kept))


def wanted_optimizer(joint: JointOptimizer, weights: Sharded) -> WantedOptimizer:
    """Return what the optimizers load, in their own memory where they keep all of a weight.

    Weights of which a rank keeps a part, at most two per optimizer, are read whole.

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
                state[f"{name}.{kind}"] = _sharded_like(
                    optimizer, shard, weights[name], whole, kind
                )
    return WantedOptimizer(state=state, parts=tuple(parts))


def set_optimizer_steps(joint: JointOptimizer, steps: int) -> None:
    """Set the number of updates that the optimizers' moments have seen."""
    for optimizer in optimizers_of(joint):
        set_steps(optimizer, steps)


@torch.no_grad()
def copy_to_masters(joint: JointOptimizer) -> None:
    """Copy weights into the master weights, after the weights alone were loaded."""
    for optimizer in optimizers_of(joint):
        for shard in shards_of(optimizer):
            if MASTER in shard.kept:
                master = shard.kept[MASTER]
                master.copy_(shard.part_of(shard.weight).view_as(master))


def _names(weights: Sharded) -> dict[int, str]:
    return {id(tensor): name for name, tensor in data_of(weights).items()}


def _sharded_like(
    optimizer: MegatronOptimizer, shard: Shard, weight: ShardedEntry, whole: Tensor, kind: str
) -> ShardedEntry:
    """Return an optimizer's tensor with the sharding of its weight.

    Where replicas shard the optimizer, the one with a weight's first element counts as the first,
    which writes it.

    Args:
        optimizer: Owner of the tensor.
        shard: Its shard of the weight.
        weight: The weight, sharded.
        whole: Tensor with as many elements as the weight.
        kind: Name of the tensor.
    """
    shaped = whole.view(weight.data.shape)
    entry: ShardedEntry = make_sharded_optimizer_tensor(weight, shaped, prefix=f"optimizer.{kind}")
    if is_sharded(optimizer) and shard.elements.start == 0:
        entry = replace(entry, replica_id=(*entry.replica_id[:-1], 0))
    return entry
