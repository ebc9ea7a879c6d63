# SPDX-License-Identifier: Apache-2.0
"""Selection in documents that branch, with the kernels that know ranges alone.

The keys on the path of a branch are laid side by side, as they are where the branch is alone in
its row, and the kernel selects among those. So the fused kernels need no rule of their own, skip
the keys of other branches, and rank ties as they do alone: a path keeps the order of the row.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys, P keys on a
path.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from megatron_keye.kernels.trapezoids import Trapezoid, find_trapezoids


@torch.no_grad()
def select_along_paths(
    select: Callable[..., Tensor],
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    key_reach_S: Tensor,
) -> Tensor:
    """Return indices_TK; see api.lightning_indexer.

    Args:
        select: An implementation that takes ranges.
        q_TIJ: Indexer queries.
        k_SJ: Keys.
        gate_TI: Weights of the heads.
        key_start_T: First visible key.
        key_end_T: One past the last visible key.
        k: Keys to select.
        key_reach_S: The largest `key_end_T` of a query that sees the key.
    """
    indices_TK = q_TIJ.new_empty((len(q_TIJ), k), dtype=torch.int32)
    for rows, trapezoid in _parts(find_trapezoids(key_start_T, key_end_T, key_reach_S)):
        queries = q_TIJ[rows], gate_TI[rows]
        if trapezoid is None:
            ranges = key_start_T[rows], key_end_T[rows]
            indices_TK[rows] = select(queries[0], k_SJ, queries[1], *ranges, k)
            continue
        keys = [*trapezoid.earlier_keys, trapezoid.triangle_keys]
        path_P = torch.cat(
            [torch.arange(each.start, each.stop, device=k_SJ.device) for each in keys]
        )
        last_T = torch.arange(trapezoid.num_queries, device=k_SJ.device)
        end_T = last_T + len(path_P) - trapezoid.num_queries + 1
        start_T = torch.zeros_like(end_T)
        on_path_TK = select(queries[0], k_SJ[path_P], queries[1], start_T, end_T, k)
        selected_TK = path_P.int()[on_path_TK.clamp(min=0).long()]
        indices_TK[rows] = selected_TK.masked_fill(on_path_TK < 0, -1)
    return indices_TK


def _parts(trapezoids: list[Trapezoid]) -> Iterator[tuple[slice, Trapezoid | None]]:
    """Yield rows and their trapezoid, or neighbouring rows together that have no gap, and None."""
    for has_gaps, group in groupby(trapezoids, lambda each: bool(each.gaps)):
        members = list(group)
        if has_gaps:
            yield from ((each.queries, each) for each in members)
        else:
            yield slice(members[0].queries.start, members[-1].queries.stop), None
