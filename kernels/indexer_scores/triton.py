# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores of a range in Triton: a program scores a block of queries and keys.

It keeps the keys and iterates over the heads, so that the sum over heads never leaves a thread. A
pair's score is the same bits in whichever block or chunk of rows it is computed.

Shape letters: T queries, S keys, I indexer heads, J indexer channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks, adjacent_channels, check_triton, padded
from megatron_keye.kernels.primitives import load_rows, score_tile

_MAX_CHANNELS = 256


TUNED_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=3, registers=168)
"""At most 168 registers, so that three programs share a multiprocessor."""
FLOAT32_BLOCKS = Blocks(rows=64, keys=64, warps=8, stages=1)


def indexer_scores(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    *,
    out_TS: Tensor | None = None,
    fill_outside: bool = True,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return scores_TS; see api.indexer_scores.

    Args:
        q_TIJ: Indexer queries.
        k_SJ: Keys.
        gate_TI: Weights of the heads.
        key_start_T: First visible key.
        key_end_T: One past the last visible key.
        out_TS: Where to write, float32 with keys adjacent; None to allocate.
        fill_outside: Whether entries outside the range become -inf; else some stay unwritten.
        blocks: How the work is cut; None for the tuned cut.

    Raises:
        ValueError: More channels than the kernel takes, or types that it does not take.
    """
    check_triton("indexer_scores", q_TIJ, q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI)
    num_queries, num_heads, num_channels = q_TIJ.shape
    num_keys = k_SJ.shape[0]
    if num_channels > _MAX_CHANNELS:
        raise ValueError(
            f"q_TIJ: got J = {num_channels}, expected at most {_MAX_CHANNELS} with impl "
            "'triton'; take impl='eager'"
        )
    q_TIJ, k_SJ = adjacent_channels(q_TIJ), adjacent_channels(k_SJ)
    if out_TS is None:
        out_TS = q_TIJ.new_empty((num_queries, num_keys), dtype=torch.float32)
    if out_TS.numel() == 0:
        return out_TS
    blocks = blocks or (FLOAT32_BLOCKS if q_TIJ.dtype == torch.float32 else TUNED_BLOCKS)
    grid = (triton.cdiv(num_keys, blocks.keys), triton.cdiv(num_queries, blocks.rows))
    _scores_kernel[grid](
        q_TIJ,
        k_SJ,
        gate_TI,
        key_start_T,
        key_end_T,
        out_TS,
        num_queries,
        num_keys,
        num_channels**-0.5,
        *q_TIJ.stride()[:2],
        k_SJ.stride(0),
        *gate_TI.stride(),
        out_TS.stride(0),
        HEADS=num_heads,
        CHANNELS=num_channels,
        PADDED_CHANNELS=padded(num_channels),
        BLOCK_T=blocks.rows,
        BLOCK_S=blocks.keys,
        FILL=fill_outside,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        maxnreg=blocks.registers,
    )
    return out_TS


@triton.jit
def _scores_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    key_start: tl.tensor,
    key_end: tl.tensor,
    out: tl.tensor,
    num_queries: int,
    num_keys: int,
    scale: float,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    out_stride_t: int,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FILL: tl.constexpr,
) -> None:
    scale = tl.cast(scale, tl.float32)  # torch.compile gives float64
    query = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0).to(tl.int64) * BLOCK_S
    place = tl.arange(0, BLOCK_S)
    is_query, is_key = query < num_queries, place < num_keys - first
    # Counted from this block's first key, bounds fit 32 bits, which compare at twice the rate.
    start = tl.load(key_start + query, is_query, other=num_keys)
    start = (tl.minimum(tl.maximum(start, first), first + BLOCK_S) - first).to(tl.int32)
    end = tl.load(key_end + query, is_query, other=0)
    end = (tl.minimum(tl.maximum(end, first), first + BLOCK_S) - first).to(tl.int32)
    out_tile = out + query[:, None] * out_stride_t + (first + place)[None, :]
    in_out = is_query[:, None] & is_key[None, :]
    is_needed = tl.max((start < end).to(tl.int32), 0) > 0
    if is_needed:
        k_tile = load_rows(k, (first + place) * k_stride_s, is_key, CHANNELS, PADDED_CHANNELS)
        scores = scale * score_tile(
            q,
            gate,
            k_tile,
            query,
            is_query,
            q_stride_t,
            q_stride_i,
            gate_stride_t,
            gate_stride_i,
            HEADS,
            CHANNELS,
            PADDED_CHANNELS,
        )
        in_range = (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        tl.store(out_tile, tl.where(in_range, scores, -float("inf")), in_out)
    elif FILL:
        tl.store(out_tile, tl.full([BLOCK_T, BLOCK_S], -float("inf"), tl.float32), in_out)
