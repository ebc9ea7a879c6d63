# SPDX-License-Identifier: Apache-2.0
"""The indexer's target in Triton, gathered by a pass of its own.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks, padded
from megatron_keye.kernels.primitives import load_rows
from megatron_keye.kernels.sparse_attention.triton import choose_blocks

TARGET_BLOCKS = Blocks(rows=16, keys=32, warps=1, stages=3)


def recover_target(
    q_THC: Tensor,
    k_SGC: Tensor,
    lse_TH: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return target_TGK, the mean over a group's heads of each softmax; see api.sparse_attention.

    One query at a time: it needs no values, and its result lies in the order of the selection.

    Args:
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        lse_TH: From `attend`.
        indices_TK: The selection.
        scale: Factor of the logits.
        blocks: How the work is cut; None for the tuned cut.
    """
    blocks = blocks or choose_blocks(TARGET_BLOCKS, q_THC)
    (num_queries, num_selected), num_groups = indices_TK.shape, k_SGC.shape[1]
    heads, channels = q_THC.shape[1] // num_groups, q_THC.shape[2]
    target_TGK = q_THC.new_empty((num_queries, num_groups, num_selected), dtype=torch.float32)
    if target_TGK.numel() > 0:
        _target_kernel[(num_queries, num_groups)](
            q_THC,
            k_SGC,
            lse_TH,
            indices_TK,
            target_TGK,
            k_SGC.shape[0],
            num_selected,
            scale * math.log2(math.e),
            *q_THC.stride()[:2],
            *k_SGC.stride()[:2],
            *indices_TK.stride(),
            HEADS=heads,
            PADDED_HEADS=padded(heads),
            CHANNELS=channels,
            PADDED_CHANNELS=padded(channels),
            BLOCK_K=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
    return target_TGK


@triton.jit
def _target_kernel(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    indices: tl.tensor,
    target: tl.tensor,
    num_keys: int,
    num_selected: int,
    scale_log2: float,
    q_stride_t: int,
    q_stride_h: int,
    k_stride_s: int,
    k_stride_g: int,
    index_stride_t: int,
    index_stride_k: int,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    query = tl.program_id(0).to(tl.int64)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    head = tl.arange(0, PADDED_HEADS)
    is_head = head < HEADS
    q_offset = (group * HEADS + head) * q_stride_h
    q_tile = load_rows(q + query * q_stride_t, q_offset, is_head, CHANNELS, PADDED_CHANNELS)
    lse_row = lse + query * (num_groups * HEADS) + group * HEADS
    head_lse = tl.load(lse_row + head, is_head, other=float("inf"))
    k_group = k + group * k_stride_g
    target_row = target + (query * num_groups + group) * num_selected
    index_row = indices + query * index_stride_t
    for start in range(0, num_selected, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        is_place = place < num_selected
        index = tl.load(index_row + place * index_stride_k, is_place, other=-1).to(tl.int64)
        is_real = (index >= 0) & (index < num_keys)
        k_tile = load_rows(k_group, index * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        weights = tl.sum(tl.exp2(logits - head_lse[:, None]), 0) / HEADS
        tl.store(target_row + place, tl.where(is_real, weights, 0.0), is_place)
