"""Gathers the tokens [S/CP] of context-parallel ranks into a row [S], in row order.

Queries stay local; keys and values are gathered, so that each rank selects among all keys of its
queries without a merge. `plan.places.owned_positions` defines which tokens a rank holds. Documents
may straddle ranks: attention is masked by row positions, so packing pads no document.
"""

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_keye.plan.places import owned_positions


def gathered_order(row_tokens: int, num_ranks: int) -> Tensor:
    """Return the index of each of the S = row_tokens positions in all ranks' parts together.

    Returns:
        int64 [S], so that gathered[order] is in row order.
    """
    ranks = range(num_ranks)
    owned = np.concatenate([owned_positions(row_tokens, num_ranks, rank) for rank in ranks])
    return torch.from_numpy(owned).argsort()


def gather_row(local: Tensor, order_S: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather every rank's tokens along the context axis, in row order; differentiable.

    Args:
        local: [S/CP, ...], this rank's tokens in the order of `owned_positions`.
        order_S: From `gathered_order`, on the device of `local`.
        group: The context axis.

    Returns:
        [S, ...]. The backward pass is a reduce-scatter of the gradients.
    """
    if group.size() == 1:
        return local
    gathered: Tensor = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    return gathered.index_select(0, order_S)
