# SPDX-License-Identifier: Apache-2.0
"""Fills sharded tensors from a checkpoint that was saved on any grid.

In place of Megatron-Core's `dist_checkpointing.load`, which unpickles .metadata, its own common
state and every object without restriction.
"""

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor

from megatron_keye.checkpoint.convert.native_folder import NativeFolder


def load_sharded(state: dict[str, Any], source: NativeFolder) -> dict[str, Any]:
    """Read what a rank's sharded tensors stand for. Not collective.

    Args:
        state: ShardedTensors and their factories, in nested dictionaries. Where a tensor keeps
            its memory, it is read into that.
        source: The checkpoint.

    Returns:
        Tensors in the same dictionaries; empty ones are left out.

    Raises:
        UserError: When the checkpoint lacks a tensor or is damaged.
    """
    tensors, _, factories = load_preprocess(state)

    def filled(sharded: ShardedTensor) -> Tensor:
        data: Tensor = sharded.data.detach()
        part = data[(None,) * sharded.prepend_axis_num]
        source.fill(sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), part)
        return data

    dict_list_map_inplace(filled, tensors)
    merged: dict[str, Any] = apply_factory_merges(tensors, factories)
    return merged
