# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to the keys in a cache of pages, which it writes first.

The operators are those of training, on keys that are gathered from their pages, so that a prompt
is read as training reads it; single new tokens of many sequences have an operator of their own,
which scores and selects as those do.
"""

import torch
from torch import Tensor

from megatron_keye.decoder.key_cache import LayerCache, RowCache
from megatron_keye.decoder.row_heads import RowHeads, RowIndexerHeads
from megatron_keye.kernels.dense_attention import dense_attention
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_fp8 import sparse_attention_fp8
from megatron_keye.kernels.sparse_decode import PagedCache, sparse_decode


@torch.no_grad()
def attend_densely(
    heads: RowHeads, layer: LayerCache, cache: RowCache, ranges: tuple[Tensor, Tensor]
) -> Tensor:
    """Write the row's keys and attend to all keys of its queries' ranges.

    Args:
        heads: Of the row.
        layer: Pages of the layer, which are written.
        cache: What the row writes and sees.
        ranges: First key and one past the last key of each query among `cache.key_slots_S`,
            int64 [T].

    Returns:
        out_THC; 0 for a query without keys.
    """
    layer.write_heads(cache.slots_T, *heads.gather.rows())
    scale = heads.q_THC.shape[-1] ** -0.5
    k_SGC, v_SGC = layer.read_heads(cache.key_slots_S, heads.q_THC.dtype)
    return dense_attention(heads.q_THC, k_SGC, v_SGC, *ranges, scale=scale)


@torch.no_grad()
def attend_sparsely(
    heads: RowHeads,
    indexer: RowIndexerHeads,
    layer: LayerCache,
    cache: RowCache,
    ranges: tuple[Tensor, Tensor],
    *,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Write the row's keys and attend to those that the indexer selects.

    Args:
        heads: Of the row.
        indexer: Of the row.
        layer: Pages of the layer, which are written.
        cache: What the row writes and sees.
        ranges: As in `attend_densely`; unused where the cache has `pages_BN`.
        top_k: Keys K that a query selects.

    Returns:
        out_THC, 0 for a query without keys, and indices_TK, int32: the selected keys by their
        place in the sequence, ascending, then -1.
    """
    layer.write_heads(cache.slots_T, *heads.gather.rows())
    layer.write_index_keys(cache.slots_T, *indexer.gather.rows())
    scale = heads.q_THC.shape[-1] ** -0.5
    if cache.pages_BN is not None:
        return _decode(heads, indexer, layer, cache, top_k, scale)
    keys_SJ = layer.read_index_keys(cache.key_slots_S, indexer.q_TIJ.dtype)
    indices_TK = lightning_indexer(
        indexer.q_TIJ,
        keys_SJ,
        indexer.gate_TI,
        *ranges,
        top_k,
        is_rounded=layer.index_scales_PL is not None,
    )
    if layer.key_scales_PLG is not None:
        rounded = layer.read_fp8_heads(cache.key_slots_S)
        out_THC = sparse_attention_fp8(heads.q_THC, *rounded, indices_TK, scale=scale)
    else:
        k_SGC, v_SGC = layer.read_heads(cache.key_slots_S, heads.q_THC.dtype)
        operands = heads.q_THC, k_SGC, v_SGC, indices_TK
        out_THC, _ = sparse_attention(*operands, scale=scale, with_target=False)
    return out_THC, torch.where(indices_TK < 0, -1, indices_TK - ranges[0][:, None].int())


def _decode(
    heads: RowHeads,
    indexer: RowIndexerHeads,
    layer: LayerCache,
    cache: RowCache,
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend with one new token of each sequence."""
    assert cache.pages_BN is not None and cache.lengths_B is not None, "they come together"
    pages = PagedCache(
        layer.keys_PLGC,
        layer.values_PLGC,
        layer.index_keys_PLJ,
        cache.pages_BN,
        cache.lengths_B,
        layer.index_scales_PL,
        layer.key_scales_PLG,
        layer.value_scales_PLG,
    )
    out_BTHC, indices_BTK = sparse_decode(
        indexer.q_TIJ[:, None],
        indexer.gate_TI[:, None],
        heads.q_THC[:, None],
        pages,
        top_k,
        scale=scale,
    )
    return out_BTHC[:, 0], indices_BTK[:, 0]
