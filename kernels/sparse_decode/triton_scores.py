# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores of the sparse decode in Triton, over the pages of the cache.

A single query would leave most of a GPU idle, so its keys are scored by many programs. A score is
the same bits as in training: one product of a key and all heads, then the heads in their order.

Shape letters: B sequences, T new queries of each, S keys, I indexer heads, J indexer channels,
P pages of the cache, L places of a page, N pages of a sequence, X parts of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from megatron_keye.kernels.launch import Blocks, padded
from megatron_keye.kernels.primitives import load_rows
from megatron_keye.kernels.sparse_decode.reference import PagedCache
from megatron_keye.kernels.sparse_decode.triton_pages import find_slots, may_overlap
from megatron_keye.kernels.sparse_decode.triton_select import can_split_rows, choose_parts

SCORE_BLOCKS = Blocks(rows=16, keys=128, warps=4, stages=2)


def score_pages(
    q_BTIJ: Tensor, gate_BTI: Tensor, cache: PagedCache, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [B * T, S], unspecified past a query's end, and what bounds the selection.

    That is end_T [B * T], one past each query's last key, and end_TX [B * T, X], the same within
    each part of its row.
    """
    num_sequences, num_queries, num_heads, num_channels = q_BTIJ.shape
    (num_pages, page_size), capacity = cache.index_keys_PLJ.shape[:2], cache.pages_BN.shape[1]
    num_keys = capacity * page_size
    scores_TS = q_BTIJ.new_empty((num_sequences * num_queries, num_keys), dtype=torch.float32)
    end_T = cache.lengths_B.new_empty(num_sequences * num_queries)
    num_parts = 1 if can_split_rows(scores_TS) else choose_parts(len(end_T), num_keys, k)
    end_TX = end_T.new_empty((len(end_T), num_parts))
    _score_kernel[(triton.cdiv(num_keys, SCORE_BLOCKS.keys), num_sequences)](
        q_BTIJ,
        gate_BTI,
        cache.index_keys_PLJ,
        cache.index_scales_PL,
        cache.pages_BN,
        cache.lengths_B,
        scores_TS,
        end_T,
        end_TX,
        num_keys,
        num_pages,
        num_channels**-0.5,
        *gate_BTI.stride(),
        *cache.index_keys_PLJ.stride()[:2],
        0 if cache.index_scales_PL is None else cache.index_scales_PL.stride(0),
        cache.pages_BN.stride(0),
        QUERIES=num_queries,
        HEADS=num_heads,
        PADDED_HEADS=padded(num_heads),
        CHANNELS=num_channels,
        PADDED_CHANNELS=padded(num_channels),
        PAGE=page_size,
        PARTS=num_parts,
        BLOCK_S=SCORE_BLOCKS.keys,
        OVERLAPS=may_overlap(q_BTIJ),
        num_warps=SCORE_BLOCKS.warps,
        num_stages=SCORE_BLOCKS.stages,
    )
    return scores_TS, end_T, end_TX


@triton.jit
def _add_heads(
    score: tl.tensor,
    dots: tl.tensor,
    gate_row: tl.tensor,
    gate_stride_i: tl.tensor,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """Return score [keys] plus gate * relu(dots), one head after the other from FIRST on.

    A sum over an axis is a tree; training adds the heads in their order, each in one fused step.
    """
    HALF: tl.constexpr = dots.shape[1] // 2
    if HALF > 0:
        halves = tl.permute(tl.reshape(dots, [dots.shape[0], 2, HALF]), (0, 2, 1))
        lower, upper = tl.split(halves)
        score = _add_heads(score, lower, gate_row, gate_stride_i, FIRST, HEADS)
        score = _add_heads(score, upper, gate_row, gate_stride_i, FIRST + HALF, HEADS)
    elif FIRST < HEADS:
        weight = tl.load(gate_row + FIRST * gate_stride_i).to(tl.float32)
        relu = tl.reshape(tl.maximum(dots, 0.0), score.shape)
        score = tl.fma(tl.broadcast_to(weight, score.shape), relu, score)
    return score


@triton.jit
def _score_kernel(
    q: tl.tensor,
    gate: tl.tensor,
    index_keys: tl.tensor,
    index_scales: tl.tensor | None,
    pages: tl.tensor,
    lengths: tl.tensor,
    scores: tl.tensor,
    ends: tl.tensor,
    part_ends: tl.tensor,
    num_keys: int,
    num_pages: int,
    scale: float,
    gate_stride_b: int,
    gate_stride_t: int,
    gate_stride_i: int,
    key_stride_p: int,
    key_stride_l: int,
    scale_stride_p: int,
    page_stride_b: int,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    scale = tl.cast(scale, tl.float32)  # torch.compile gives float64
    if OVERLAPS:
        gdc_launch_dependents()
    sequence = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    key = first + tl.arange(0, BLOCK_S)
    # Loaded together with the length: one wait for memory less.
    page, place, is_real = find_slots(
        pages + sequence * page_stride_b, key, key < num_keys, num_pages, PAGE
    )
    length = tl.minimum(tl.load(lengths + sequence), num_keys)
    if first == 0:
        for query in range(QUERIES):
            end = tl.maximum(length - (QUERIES - 1 - query), 0)
            row = sequence * QUERIES + query
            tl.store(ends + row, end)
            part = tl.arange(0, PARTS)
            part_end = tl.minimum(end - part * (num_keys // PARTS), num_keys // PARTS)
            tl.store(part_ends + row * PARTS + part, tl.maximum(part_end, 0))
    if first < length:
        is_key = key < length
        is_real = is_real & is_key
        k_tile = load_rows(
            index_keys,
            page * key_stride_p + place * key_stride_l,
            is_real,
            CHANNELS,
            PADDED_CHANNELS,
        ).to(q.dtype.element_ty)
        head = tl.arange(0, PADDED_HEADS)
        for query in range(QUERIES):
            row = sequence * QUERIES + query
            q_tile = load_rows(
                q + row * (HEADS * CHANNELS),
                head * CHANNELS,
                head < HEADS,
                CHANNELS,
                PADDED_CHANNELS,
            )
            gate_row = gate + sequence * gate_stride_b + query * gate_stride_t
            dots = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            score = tl.zeros([BLOCK_S], tl.float32)
            score = _add_heads(score, dots, gate_row, gate_stride_i, 0, HEADS)
            if index_scales is not None:
                # A power of two: exact here as on each channel of the key.
                score *= tl.load(index_scales + page * scale_stride_p + place, is_real, other=0.0)
            score = tl.where(is_real, score * scale, -float("inf"))
            tl.store(scores + row * num_keys + key, score, is_key)
