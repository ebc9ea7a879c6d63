# SPDX-License-Identifier: Apache-2.0
"""Inputs of a sparse decode on a GPU, and its attention in float64 over given keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization import quantize_heads
from megatron_keye.kernels.indexer_quantization import quantize, round_to_fp8
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_decode import PagedCache

Queries = tuple[Tensor, Tensor, Tensor]


class Sizes(NamedTuple):
    """Sizes of a decode; those of the model unless said."""

    lengths: tuple[int, ...]
    num_queries: int = 1
    page: int = 64
    groups: int = 4
    heads: int = 8
    """Of a group."""
    channels: int = 128
    index_heads: int = 16
    is_quantized: bool = False
    """Whether indexer keys have 8 bits."""
    has_fp8_heads: bool = False
    """Whether keys and values do."""


def make_decode(sizes: Sizes) -> tuple[Queries, PagedCache]:
    """Return random bfloat16 queries and a cache of shuffled pages, whose unused places are NaN.

    Keys and values of a place lie side by side, as a rollout's do. Pages past a sequence's length
    are -1.
    """
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    lengths_B = torch.tensor(sizes.lengths, device="cuda")
    num_sequences, num_pages = len(sizes.lengths), max(1, -(-max(sizes.lengths) // sizes.page))
    order = torch.randperm(num_sequences * num_pages, generator=generator, device="cuda")
    pages_BN = order.view(num_sequences, num_pages).int()
    place_S = torch.arange(num_pages * sizes.page, device="cuda")
    is_used_BS = place_S < lengths_B[:, None]
    is_used_PL = torch.empty(num_sequences * num_pages, sizes.page, dtype=bool, device="cuda")
    is_used_PL[order] = is_used_BS.view(-1, sizes.page)
    first_N = torch.arange(num_pages, device="cuda") * sizes.page
    pages_BN = pages_BN.masked_fill(first_N >= lengths_B[:, None], -1)
    heads_PL2GC = normal(*is_used_PL.shape, 2, sizes.groups, sizes.channels)
    heads_PL2GC[~is_used_PL] = torch.nan
    index_keys_PLJ, scales_PL = normal(*is_used_PL.shape, 64), None
    q_BTIJ = normal(num_sequences, sizes.num_queries, sizes.index_heads, 64)
    if sizes.is_quantized:
        q_BTIJ = round_to_fp8(q_BTIJ)
        index_keys_PLJ, scales_PL = quantize(index_keys_PLJ)
        index_keys_PLJ.view(torch.uint8)[~is_used_PL] = 0x7F
        scales_PL[~is_used_PL] = torch.nan
    else:
        index_keys_PLJ[~is_used_PL] = torch.nan
    queries = (
        q_BTIJ,
        normal(num_sequences, sizes.num_queries, sizes.index_heads),
        normal(num_sequences, sizes.num_queries, sizes.groups * sizes.heads, sizes.channels),
    )
    keys_PLGC, values_PLGC = heads_PL2GC.unbind(2)
    cache = PagedCache(keys_PLGC, values_PLGC, index_keys_PLJ, pages_BN, lengths_B, scales_PL)
    return queries, rounded_heads(cache) if sizes.has_fp8_heads else cache


def rounded_heads(cache: PagedCache) -> PagedCache:
    """Return the cache with keys and values of 8 bits, unused places NaN as they were."""
    heads_PL2GC = torch.stack(cache[:2], dim=2)
    is_unused_PL2G = heads_PL2GC.isnan().any(dim=-1)
    values_PL2GC, scales_PL2G = quantize_heads(heads_PL2GC.nan_to_num())
    values_PL2GC.view(torch.uint8)[is_unused_PL2G] = 0x7F
    keys_PLGC, values_PLGC = values_PL2GC.unbind(2)
    key_scales_PLG, value_scales_PLG = scales_PL2G.masked_fill(is_unused_PL2G, torch.nan).unbind(2)
    return cache._replace(
        keys_PLGC=keys_PLGC,
        values_PLGC=values_PLGC,
        key_scales_PLG=key_scales_PLG,
        value_scales_PLG=value_scales_PLG,
    )


def exact_attention(
    query_BTHC: Tensor, cache: PagedCache, indices_BTK: Tensor, scale: float
) -> Tensor:
    """Return out_BTHC in float64 over the selected keys, without those that have no page."""
    page = cache.keys_PLGC.shape[1]
    outs = []
    for query_THC, pages_N, indices_TK in zip(
        query_BTHC, cache.pages_BN, indices_BTK.long(), strict=True
    ):
        page_TK = pages_N[indices_TK.clamp(min=0) // page].long()
        is_real_TK = (indices_TK >= 0) & (page_TK >= 0) & (page_TK < len(cache.keys_PLGC))
        slot_TK = (page_TK * page + indices_TK % page).masked_fill(~is_real_TK, -1)
        slots, place_TK = slot_TK.clamp(min=0).unique(return_inverse=True)
        k_SGC, v_SGC = (
            _widened(each, scales, slots).nan_to_num()
            for each, scales in zip(cache[:2], cache[6:], strict=True)
        )
        # Ascending, with what has no page behind all others.
        place_TK = place_TK.masked_fill(~is_real_TK, len(slots)).sort(1).values
        place_TK = place_TK.masked_fill(place_TK == len(slots), -1).int()
        out_THC, _ = sparse_attention(
            query_THC.double(), k_SGC, v_SGC, place_TK, scale=scale, impl="eager"
        )
        outs.append(out_THC)
    return torch.stack(outs)


def _widened(heads_PLGC: Tensor, scales_PLG: Tensor | None, slots_S: Tensor) -> Tensor:
    """Return keys or values [S, G, C] at slots in float64."""
    if scales_PLG is None:
        return heads_PLGC.flatten(0, 1)[slots_S].double()
    values_SGC = heads_PLGC.view(torch.uint8).flatten(0, 1)[slots_S].view(torch.float8_e4m3fn)
    return values_SGC.double() * scales_PLG.flatten(0, 1)[slots_S].double()[..., None]
