# SPDX-License-Identifier: Apache-2.0
"""Names the tensors of a run's state that hold numbers which no state may hold.

A checkpoint of such a state would be pruned over good ones, so none is saved.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of
from megatron_keye.checkpoint.state import data_of, weight_state
from megatron_keye.errors import UserError
from megatron_keye.model import KeyeModel
from megatron_keye.optim.finite import is_sick
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.health.wording import first_of

_SQUARES = "exp_avg_sq"


@torch.no_grad()
def sick_tensors(model: KeyeModel, optimizer: JointOptimizer, grid: Grid) -> list[str]:
    """Return the tensors that are not finite, or negative where they average squares.

    Looks at weights, frozen ones too, master weights and moments, each of which it reads once.
    Collective: all ranks must call it.

    Args:
        model: Parts of the model on this rank.
        optimizer: Their optimizers.
        grid: Groups of this rank.

    Returns:
        Name and rank of each, the same on every rank.
    """
    device = torch.device(torch.cuda.current_device())
    state = list(_named_state(model, optimizer, grid))
    plain = [tensor for name, tensor in state if not name.endswith(_SQUARES)]
    squares = [tensor for name, tensor in state if name.endswith(_SQUARES)]
    is_any = is_sick(plain, device, is_square=False) | is_sick(squares, device, is_square=True)
    num_ranks = is_any.long()
    dist.all_reduce(num_ranks)
    if not num_ranks:
        return []
    mine = [
        f"{name} (rank {grid.rank})"
        for name, tensor in state
        if is_sick([tensor], device, is_square=name.endswith(_SQUARES))
    ]
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [name for of_rank in gathered for name in of_rank]


def check_before_save(
    model: KeyeModel, optimizer: JointOptimizer, grid: Grid, *, step: int, kept: Path | None
) -> None:
    """Refuse to save a sick state. Collective: all ranks must call it, before they save.

    Args:
        model: Parts of the model on this rank.
        optimizer: Their optimizers.
        grid: Groups of this rank.
        step: Steps done.
        kept: Newest checkpoint, None without one.

    Raises:
        UserError: On all ranks, naming the tensors, if a number is not finite.
    """
    sick = sick_tensors(model, optimizer, grid)
    if sick:
        remedy = f"{kept} stays; go on from it with --resume auto" if kept else "begin anew"
        raise UserError(
            f"step {step}: no checkpoint was saved, since got numbers that are not finite, or "
            f"negative second moments, in {first_of(sick)}, expected none; {remedy}, with a lower "
            "training.optimizer.learning_rate or on other hardware if it comes back"
        )


def _named_state(
    model: KeyeModel, optimizer: JointOptimizer, grid: Grid
) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's weights, masters and moments under their names in the whole model."""
    weights = weight_state(model, grid)
    names: dict[int, str] = {}
    for local, tensor in data_of(weights).items():
        names[id(tensor)] = _name(weights[local])
        if tensor.is_floating_point():
            yield names[id(tensor)], tensor
    for part in optimizers_of(optimizer):
        for shard in shards_of(part):
            for kind, kept in shard.kept.items():
                yield f"{names[id(shard.weight)]} {kind}", kept


def _name(entry: ShardedTensor | ShardedTensorFactory) -> str:
    """Return a weight's name, with its layer and experts where those share one name."""
    parts = [entry] if isinstance(entry, ShardedTensor) else list(nested_values([entry.build()]))
    places = [part.global_offset[: part.prepend_axis_num] for part in parts]
    indices = [
        f"{first}" if first == last else f"{first}-{last}"
        for first, last in zip(min(places), max(places), strict=True)
    ]
    return f"{entry.key}[{', '.join(indices)}]" if indices else str(entry.key)
