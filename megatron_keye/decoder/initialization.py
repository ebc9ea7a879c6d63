# SPDX-License-Identifier: Apache-2.0
"""Initial weights that depend only on a parameter's name and the seed.

So a run starts from the same model on any number of ranks.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_keye.config.lora import LORA_A, LORA_B, initial_std
from megatron_keye.kernels.drawn_normal import fill_normal


@torch.no_grad()
def initialize_weights(sharded_state: dict[str, Any], *, std: float, seed: int) -> None:
    """Draw every matrix from a normal distribution; norms and biases keep their values.

    An adapter begins as 0: its B is 0, and its A is drawn with a deviation of its own.

    Each number depends on the seed, its matrix's key, layer and expert, and its place in the
    matrix: a rank draws its own shards alone, where they are.

    Args:
        sharded_state: A module's sharded_state_dict, whose tensors share memory with its weights.
        std: Standard deviation.
        seed: The run's seed.
    """
    apply_factories(sharded_state)
    for tensor in nested_values(sharded_state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            _draw(tensor, std, seed)


def _draw(tensor: ShardedTensor, std: float, seed: int) -> None:
    first = tensor.prepend_axis_num
    whole_shape, offsets = tensor.global_shape[first:], tensor.global_offset[first:]
    if len(whole_shape) < 2:
        return
    data = tensor.data
    assert data is not None, "only tensors with data are drawn"
    kind = tensor.key.rpartition(".")[2]
    if kind == LORA_B:
        data.zero_()
        return
    if kind == LORA_A:
        std = initial_std(whole_shape[-1])
    name = f"{seed}/{tensor.key}/{tensor.global_offset[:first]}"
    fill_normal(data, name, std=std, whole_shape=whole_shape, offset=offsets)
