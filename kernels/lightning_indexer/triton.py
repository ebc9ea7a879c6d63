# SPDX-License-Identifier: Apache-2.0
"""Lightning indexer on a GPU: scores of some rows in Triton, then their exact top-k.

No more than a byte budget of the score matrix exists at any moment. A row's selection does not
depend on the chunk that it falls into, so recomputation repeats it bit by bit.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_scores.triton import indexer_scores
from megatron_keye.kernels.ranges import named
from megatron_keye.kernels.select_top_k import fastest_impl

CHUNK_BYTES = 2**30
"""Bytes of float32 scores at once; tests shrink it."""
_ROW_MULTIPLE = 128
"""Rows of a block of the score kernel, so that chunks waste none."""


@torch.no_grad()
def lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
) -> Tensor:
    """Return indices_TK; see api.lightning_indexer. NaN scores rank below -inf."""
    num_queries, num_keys = q_TIJ.shape[0], k_SJ.shape[0]
    num_rows = max(1, CHUNK_BYTES // max(1, 4 * num_keys))
    num_rows = max(1, num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    select = _selection(q_TIJ)
    scores_TS = q_TIJ.new_empty((min(num_rows, num_queries), num_keys), dtype=torch.float32)
    indices_TK = q_TIJ.new_empty((num_queries, k), dtype=torch.int32)
    for first in range(0, num_queries, num_rows):
        rows = slice(first, first + num_rows)
        ranges = key_start_T[rows], key_end_T[rows]
        chunk_TS = scores_TS[: len(ranges[0])]
        indexer_scores(
            q_TIJ[rows], k_SJ, gate_TI[rows], *ranges, out_TS=chunk_TS, fill_outside=False
        )
        with named("select_top_k"):
            indices_TK[rows] = select(chunk_TS, *ranges, k)
    return indices_TK


def _selection(on: Tensor) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Return the fastest selection itself, without the public function's checks of each chunk."""
    implementation = import_module(f"megatron_keye.kernels.select_top_k.{fastest_impl(on)}")
    select: Callable[[Tensor, Tensor, Tensor, int], Tensor] = implementation.select_top_k
    return select
