# SPDX-License-Identifier: Apache-2.0
"""Eager form of the sparse decode: gather a sequence's pages, then the operators of training.

It is the composition of their definitions, one sequence at a time, and adds the pages alone.

Shape letters: B sequences, T new queries of each, S keys, I indexer heads, J indexer channels,
H query heads, G key-value heads, C channels of a head, K selected keys, P pages of the cache,
L places of a page, N pages of a sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization.reference import dequantize_heads
from megatron_keye.kernels.indexer_quantization.reference import dequantize
from megatron_keye.kernels.indexer_scores.reference import score_range
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.select_top_k.reference import select_top_k
from megatron_keye.kernels.sparse_attention.reference import sparse_attention
from megatron_keye.kernels.visible_keys import gather_selected


class PagedCache(NamedTuple):
    """Keys, values and indexer keys of all sequences, in pages that lie anywhere."""

    keys_PLGC: Tensor
    values_PLGC: Tensor
    """Type and shape of the keys."""
    index_keys_PLJ: Tensor
    """The key that all indexer heads share."""
    pages_BN: Tensor
    """int32: in which page a sequence's keys 0 to L-1, L to 2L-1, ... lie; -1 for none."""
    lengths_B: Tensor
    """int64: keys of each sequence so far, those of its new queries included; 0 for none."""
    index_scales_PL: Tensor | None = None
    """float32: one for each indexer key where those are e4m3; else None."""
    key_scales_PLG: Tensor | None = None
    """float32: one for each head's key where keys and values are e4m3, as `quantize_heads` of
    `head_quantization` returns them; else None."""
    value_scales_PLG: Tensor | None = None
    """Those of the values, beside those of the keys."""


@torch.no_grad()
def sparse_decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    cache: PagedCache,
    k: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_BTHC and indices_BTK; see api.sparse_decode."""
    num_queries, page_size = q_BTIJ.shape[1], cache.keys_PLGC.shape[1]
    place_L = torch.arange(page_size, device=q_BTIJ.device)
    before_T = torch.arange(num_queries - 1, -1, -1, device=q_BTIJ.device)
    zero_T = torch.zeros_like(before_T)
    dtype = accumulation_dtype(q_BTIJ, gate_BTI)
    out_BTHC = torch.zeros_like(query_BTHC, memory_format=torch.contiguous_format)
    indices_BTK = cache.pages_BN.new_empty((*q_BTIJ.shape[:2], k), dtype=torch.int32)
    index_keys_PLJ, scales_PL = cache.index_keys_PLJ, cache.index_scales_PL
    if scales_PL is not None:
        index_keys_PLJ = dequantize(index_keys_PLJ, scales_PL, q_BTIJ.dtype)
    keys_PLGC, values_PLGC = cache.keys_PLGC, cache.values_PLGC
    if cache.key_scales_PLG is not None and cache.value_scales_PLG is not None:
        wide = accumulation_dtype(query_BTHC)
        keys_PLGC = dequantize_heads(keys_PLGC, cache.key_scales_PLG, wide)
        values_PLGC = dequantize_heads(values_PLGC, cache.value_scales_PLG, wide)
    for sequence, pages_N in enumerate(cache.pages_BN.long()):
        slot_NL = pages_N[:, None] * page_size + place_L
        is_page_N = (pages_N >= 0) & (pages_N < len(cache.keys_PLGC))
        slot_S = slot_NL.masked_fill(~is_page_N[:, None], -1).flatten()
        length = cache.lengths_B[sequence].clamp(max=len(slot_S))
        slot_S[length:] = -1
        end_T = (length - before_T).clamp(min=0)
        index_keys_1SJ, is_real_1S = gather_selected(index_keys_PLJ.flatten(0, 1), slot_S[None])
        (scores_TS,) = score_range(
            q_BTIJ[sequence], gate_BTI[sequence], zero_T, end_T, index_keys_1SJ[0].to(dtype)
        )
        scores_TS = scores_TS.masked_fill(~is_real_1S, -torch.inf)
        indices_TK = select_top_k(scores_TS, zero_T, end_T, k)
        padded_S = torch.cat([slot_S, slot_S.new_full((1,), -1)])
        out_BTHC[sequence], _ = sparse_attention(
            query_BTHC[sequence],
            keys_PLGC.flatten(0, 1),
            values_PLGC.flatten(0, 1),
            padded_S[indices_TK.long()],
            scale=scale,
        )
        indices_BTK[sequence] = indices_TK
    return out_BTHC, indices_BTK
