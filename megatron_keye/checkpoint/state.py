"""Weights as a checkpoint holds them: under their names in the whole model, for any grid."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid

Sharded = dict[str, Any]
"""Local names to ShardedTensors or their factories."""


def weight_state(model: KeyeModel, grid: Grid) -> Sharded:
    """Return the weights of this rank as sharded tensors that share memory with them.

    Args:
        model: What this rank owns.
        grid: Groups of this rank.
    """
    state: Sharded = {}
    for index, stage in enumerate(model.stages):
        assert grid.decoder is not None, "stages stand on decoder ranks"
        part = stage.module.sharded_state_dict(prefix="decoder.", metadata=_metadata(grid.decoder))
        state |= {f"stage{index}.{name}": value for name, value in part.items()}
    if model.vision is not None:
        assert grid.vision is not None, "vision stands on vision ranks"
        state |= sharded_state_dict_default(
            model.vision.module,
            "vision.",
            (),
            _metadata(grid.vision),
            tp_group=grid.vision.tp,
        )
    return state


@torch.no_grad()
def copy_loaded(loaded: dict[str, Any], targets: dict[str, Tensor]) -> None:
    """Copy loaded tensors into the tensors that asked for them.

    Args:
        loaded: Tensors by local name.
        targets: What `data_of` gave for the same names before loading.
    """
    for name, target in targets.items():
        if loaded[name] is not target:
            target.copy_(loaded[name])


def data_of(state: Sharded) -> dict[str, Tensor]:
    """Return the tensors behind sharded tensors, by local name."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {name: value.data for name, value in state.items() if isinstance(value, kinds)}


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {"dp_cp_group": groups.dp_cp}
