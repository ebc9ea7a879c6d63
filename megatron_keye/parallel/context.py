"""Splits a row's tokens over context-parallel ranks and brings keys together again.

Queries stay where they are; keys and values are gathered, so that each rank can select among all
keys of its queries without a merge. The row is cut into 2 x CP equal parts and rank i takes parts
i and 2 x CP - 1 - i (zigzag), which evens out causal work. Documents may straddle parts: attention
goes by row positions, so packing needs no padding per document.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def owned_positions(row_tokens: int, num_ranks: int, rank: int) -> Tensor:
    """Return the row positions that a context-parallel rank holds.

    Args:
        row_tokens: Length S of the row, a multiple of 2 x num_ranks unless num_ranks is 1.
        num_ranks: Size CP of the context axis.
        rank: Rank along it.

    Returns:
        int64 [S/CP], ascending.
    """
    if num_ranks == 1:
        return torch.arange(row_tokens)
    parts = torch.arange(row_tokens).view(2 * num_ranks, -1)
    return torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]])


def gathered_order(row_tokens: int, num_ranks: int) -> Tensor:
    """Return, for each row position, where it lies after concatenating all ranks' parts.

    Returns:
        int64 [S], so that gathered[order] stands in row order.
    """
    ranks = range(num_ranks)
    return torch.cat([owned_positions(row_tokens, num_ranks, rank) for rank in ranks]).argsort()


def gather_row(local: Tensor, order_S: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather every rank's tokens along the context axis, in row order; differentiable.

    Args:
        local: [S/CP, ...], this rank's tokens in the order of `owned_positions`.
        order_S: From `gathered_order`, on the device of `local`.
        group: The context axis.

    Returns:
        [S, ...]. The backward pass adds up all ranks' gradients and keeps the own part
        (reduce-scatter).
    """
    if group.size() == 1:
        return local
    gathered: Tensor = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    return gathered.index_select(0, order_S)
