# SPDX-License-Identifier: Apache-2.0
"""Weights as sharded tensors under their names in the whole model, for any grid."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid

Sharded = dict[str, Any]
"""ShardedTensors or their factories, by local name."""


def weight_state(model: KeyeModel, grid: Grid) -> Sharded:
    """Return the weights of this rank as sharded tensors that share memory with them.

    Args:
        model: Parts of the model on this rank.
        grid: Groups of this rank.
    """
    state: Sharded = {}
    for index, stage in enumerate(model.stages):
        assert grid.decoder is not None, "only decoder ranks have stages"
        part = stage.module.sharded_state_dict(prefix="decoder.", metadata=_metadata(grid.decoder))
        state |= {f"stage{index}.{name}": value for name, value in part.items()}
    if model.vision is not None:
        assert grid.vision is not None, "only vision ranks have the ViT"
        state |= sharded_state_dict_default(
            model.vision.module,
            "vision.",
            (),
            _metadata(grid.vision),
            tp_group=grid.vision.tp,
        )
    return without_objects(state)


def without_objects(state: dict[str, Any]) -> Sharded:
    """Leave out what linears keep for 8-bit training: pickles, which training does not read."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {name: value for name, value in state.items() if isinstance(value, kinds)}


@torch.no_grad()
def copy_loaded(loaded: dict[str, Any], targets: dict[str, Tensor]) -> None:
    """Copy loaded tensors into the tensors that they were loaded for, unless they were read there.

    Args:
        loaded: Tensors by local name.
        targets: From `data_of` before loading, with the same names.
    """
    for name, target in targets.items():
        if loaded[name].data_ptr() != target.data_ptr():
            target.copy_(loaded[name])


def data_of(state: Sharded) -> dict[str, Tensor]:
    """Return the tensors behind sharded tensors, by local name."""
    return {name: value.data for name, value in state.items()}


def shards_of(state: Sharded) -> list[ShardedTensor]:
    """Return the shards of whole tensors that a state consists of, which share memory with it.

    Args:
        state: Sharded tensors; a factory may stand for several shards, as of experts.
    """
    made: Sharded = dict(state)
    apply_factories(made)
    return list(nested_values(made))


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {"dp_cp_group": groups.dp_cp}
