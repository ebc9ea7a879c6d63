# SPDX-License-Identifier: Apache-2.0
"""The sparse decode in Triton: scores over the pages, exact top-k, attention in parts, their sum.

A single query would leave most of a GPU idle, so its selected keys are split over several
programs, whose outputs the last kernel weighs and adds. On Hopper each kernel starts while the
one before it ends, and waits for it before it reads.

Shape letters: B sequences, T new queries of each, I indexer heads, J indexer channels,
H query heads, G key-value heads, C channels of a head, K selected keys, P pages of the cache,
L places of a page, N pages of a sequence, X parts of a selection.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from megatron_keye.kernels.launch import (
    Blocks,
    adjacent_channels,
    check_triton,
    padded,
    same_strides,
)
from megatron_keye.kernels.primitives import load_rows, online_softmax_update
from megatron_keye.kernels.sparse_decode.reference import PagedCache
from megatron_keye.kernels.sparse_decode.triton_pages import find_slots, may_overlap
from megatron_keye.kernels.sparse_decode.triton_scores import score_pages
from megatron_keye.kernels.sparse_decode.triton_select import select_from_parts

ATTEND_BLOCKS = Blocks(rows=16, keys=64, warps=4, stages=2)
PROGRAMS = 512
"""Programs of the attention that selections are cut for: about four per multiprocessor."""
_MAX_HEADS, _MAX_CHANNELS = 64, 256


def sparse_decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    cache: PagedCache,
    k: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_BTHC and indices_BTK; see api.sparse_decode.

    Raises:
        ValueError: More heads or channels than the kernels take, or types that they do not take.
    """
    q_BTIJ, query_BTHC, cache = _checked(q_BTIJ, gate_BTI, query_BTHC, cache)
    num_rows = q_BTIJ.shape[0] * q_BTIJ.shape[1]
    indices_BTK = cache.pages_BN.new_empty((*q_BTIJ.shape[:2], k), dtype=torch.int32)
    out_BTHC = torch.empty_like(query_BTHC, memory_format=torch.contiguous_format)
    if num_rows == 0 or cache.pages_BN.numel() == 0 or len(cache.keys_PLGC) == 0:
        return out_BTHC.zero_(), indices_BTK.fill_(-1)
    indices_TK = select_from_parts(*score_pages(q_BTIJ, gate_BTI, cache, k), k)
    _attend(query_BTHC, cache, indices_TK, out_BTHC, scale=scale)
    return out_BTHC, indices_TK.view(indices_BTK.shape)


def _checked(
    q_BTIJ: Tensor, gate_BTI: Tensor, query_BTHC: Tensor, cache: PagedCache
) -> tuple[Tensor, Tensor, PagedCache]:
    """Return the inputs as the kernels read them."""
    check_triton(
        "sparse_decode",
        q_BTIJ,
        q_BTIJ=q_BTIJ,
        gate_BTI=gate_BTI,
        query_BTHC=query_BTHC,
    )
    heads = max(q_BTIJ.shape[2], query_BTHC.shape[2] // cache.keys_PLGC.shape[2])
    channels = max(q_BTIJ.shape[3], query_BTHC.shape[3])
    if heads > _MAX_HEADS or channels > _MAX_CHANNELS:
        raise ValueError(
            f"sparse_decode: impl 'triton' got {heads} heads (of the indexer or of a group) of "
            f"{channels} channels, expected at most {_MAX_HEADS} of {_MAX_CHANNELS}; take "
            "impl='eager'"
        )
    keys_PLGC, values_PLGC, index_keys_PLJ = map(adjacent_channels, cache[:3])
    keys_PLGC, values_PLGC = same_strides(keys_PLGC, values_PLGC)
    index_scales_PL, key_scales_PLG, value_scales_PLG = (
        scales if scales is None else adjacent_channels(scales) for scales in cache[5:]
    )
    if key_scales_PLG is not None and value_scales_PLG is not None:
        key_scales_PLG, value_scales_PLG = same_strides(key_scales_PLG, value_scales_PLG)
    cache = PagedCache(
        keys_PLGC,
        values_PLGC,
        index_keys_PLJ,
        adjacent_channels(cache.pages_BN),
        cache.lengths_B.contiguous(),
        index_scales_PL,
        key_scales_PLG,
        value_scales_PLG,
    )
    return q_BTIJ.contiguous(), query_BTHC.contiguous(), cache


def _attend(
    query_BTHC: Tensor, cache: PagedCache, indices_TK: Tensor, out_BTHC: Tensor, *, scale: float
) -> None:
    """Write the attention over the selected keys to out_BTHC."""
    _, num_queries, num_heads, num_channels = query_BTHC.shape
    num_pages, page_size, num_groups, _ = cache.keys_PLGC.shape
    num_rows, num_selected = indices_TK.shape
    wanted = max(1, PROGRAMS // (num_rows * num_groups))
    steps = triton.cdiv(triton.cdiv(num_selected, ATTEND_BLOCKS.keys), wanted)
    num_parts = triton.cdiv(num_selected, steps * ATTEND_BLOCKS.keys)
    overlaps = may_overlap(query_BTHC)
    part_TXHC = query_BTHC.new_empty(
        (num_rows, num_parts, num_heads, num_channels), dtype=torch.float32
    )
    lse_TXH = part_TXHC.new_empty(part_TXHC.shape[:3])
    sizes = {
        "HEADS": num_heads // num_groups,
        "CHANNELS": num_channels,
        "PADDED_CHANNELS": padded(num_channels),
    }
    _attend_kernel[(num_rows, num_groups, num_parts)](
        query_BTHC,
        cache.keys_PLGC,
        cache.key_scales_PLG,
        cache.values_PLGC,
        cache.value_scales_PLG,
        cache.pages_BN,
        indices_TK,
        part_TXHC,
        lse_TXH,
        num_selected,
        num_pages,
        steps * ATTEND_BLOCKS.keys,
        scale * math.log2(math.e),
        *cache.keys_PLGC.stride()[:3],
        *((0, 0) if cache.key_scales_PLG is None else cache.key_scales_PLG.stride()[:2]),
        cache.pages_BN.stride(0),
        QUERIES=num_queries,
        PADDED_HEADS=padded(num_heads // num_groups),
        PAGE=page_size,
        BLOCK_K=ATTEND_BLOCKS.keys,
        OVERLAPS=overlaps,
        **sizes,
        num_warps=ATTEND_BLOCKS.warps,
        num_stages=ATTEND_BLOCKS.stages,
        launch_pdl=overlaps,
    )
    _merge_kernel[(num_rows, num_heads)](
        part_TXHC,
        lse_TXH,
        out_BTHC,
        num_parts,
        CHANNELS=num_channels,
        PADDED_CHANNELS=padded(num_channels),
        PADDED_PARTS=padded(num_parts, smallest=1),
        OVERLAPS=overlaps,
        num_warps=4,
        launch_pdl=overlaps,
    )


@triton.jit
def _attend_kernel(
    query_heads: tl.tensor,
    keys: tl.tensor,
    key_scales: tl.tensor | None,
    values: tl.tensor,
    value_scales: tl.tensor | None,
    pages: tl.tensor,
    indices: tl.tensor,
    parts: tl.tensor,
    lse: tl.tensor,
    num_selected: int,
    num_pages: int,
    part_size: int,
    scale_log2: float,
    key_stride_p: int,
    key_stride_l: int,
    key_stride_g: int,
    scale_stride_p: int,
    scale_stride_l: int,
    page_stride_b: int,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    row = tl.program_id(0).to(tl.int64)
    group, num_groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    head = tl.arange(0, PADDED_HEADS)
    is_head = head < HEADS
    query_tile = load_rows(
        query_heads + (row * num_groups + group) * (HEADS * CHANNELS),
        head * CHANNELS,
        is_head,
        CHANNELS,
        PADDED_CHANNELS,
    )
    if OVERLAPS:
        gdc_wait()  # for the selection
        gdc_launch_dependents()
    # Finite, so that a row without any key never computes inf - inf.
    m_i = tl.full([PADDED_HEADS], -1.0e38, tl.float32)
    l_i = tl.zeros([PADDED_HEADS], tl.float32)
    acc = tl.zeros([PADDED_HEADS, PADDED_CHANNELS], tl.float32)
    for start in range(part * part_size, (part + 1) * part_size, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        key = tl.load(indices + row * num_selected + place, place < num_selected, other=-1)
        page, place, is_real = find_slots(
            pages + row // QUERIES * page_stride_b, key, key >= 0, num_pages, PAGE
        )
        offset = page * key_stride_p + place * key_stride_l + group * key_stride_g
        key_tile = load_rows(keys, offset, is_real, CHANNELS, PADDED_CHANNELS)
        value_tile = load_rows(values, offset, is_real, CHANNELS, PADDED_CHANNELS)
        # 8 bits fit into the queries' type; a scale factors out of its key's products.
        key_tile, value_tile = key_tile.to(query_tile.dtype), value_tile.to(query_tile.dtype)
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale_log2
        value_scale = None
        if key_scales is not None:
            offset = page * scale_stride_p + place * scale_stride_l + group
            logits *= tl.load(key_scales + offset, is_real, other=0.0)[None, :]
            value_scale = tl.load(value_scales + offset, is_real, other=0.0)
        logits = tl.where(is_real[None, :], logits, -float("inf"))
        m_i, l_i, acc = online_softmax_update(m_i, l_i, acc, logits, value_tile, value_scale)
    has_keys = l_i > 0
    part_out = acc / tl.where(has_keys, l_i, 1.0)[:, None]
    part_lse = tl.where(has_keys, m_i + tl.log2(l_i), -float("inf"))
    place = ((row * num_parts + part) * num_groups + group) * HEADS + head
    tl.store(lse + place, part_lse, is_head)
    channel = tl.arange(0, PADDED_CHANNELS)
    is_stored = is_head[:, None] & (channel < CHANNELS)[None, :]
    tl.store(parts + place[:, None] * CHANNELS + channel[None, :], part_out, is_stored)


@triton.jit
def _merge_kernel(
    parts: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    num_parts: int,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    if OVERLAPS:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    part = tl.arange(0, PADDED_PARTS)
    place = (row * num_parts + part) * num_heads + head
    part_lse = tl.load(lse + place, part < num_parts, other=-float("inf"))
    m_i = tl.max(part_lse, 0)
    weight = tl.exp2(part_lse - tl.where(m_i > -float("inf"), m_i, 0.0))
    l_i = tl.sum(weight, 0)
    tile = load_rows(parts, place * CHANNELS, part < num_parts, CHANNELS, PADDED_CHANNELS)
    merged = tl.sum(weight[:, None] * tile, 0) / tl.where(l_i > 0, l_i, 1.0)
    channel = tl.arange(0, PADDED_CHANNELS)
    out_row = out + (row * num_heads + head) * CHANNELS
    tl.store(out_row + channel, merged.to(out.dtype.element_ty), channel < CHANNELS)
