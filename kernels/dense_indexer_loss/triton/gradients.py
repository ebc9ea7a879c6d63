# SPDX-License-Identifier: Apache-2.0
"""What the gradient of the indexer's scores gives its queries, gates and keys, in Triton.

Two kernels share the work, a chunk of rows at a time: one adds the scores' gradient up over keys
for the indexer's queries and gates, one over queries for its keys. Each sum has one owner and one
order, so the gradients are the same bits at every call.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss.triton.ranges import is_spanned
from megatron_keye.kernels.dense_indexer_loss.triton.tiles import (
    DenseInputs,
    launch_constants,
    load_block,
    locate_block,
)
from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import load_rows, store_rows

QUERY_BLOCKS = Blocks(rows=64, keys=64, warps=4, stages=3, registers=128)
KEY_BLOCKS = Blocks(rows=64, keys=64, warps=4, stages=3, registers=168)


class Gradients:
    """Gradients of the indexer, filled a chunk of rows at a time."""

    def __init__(self, inputs: DenseInputs) -> None:
        """Make room; chunks then come in any order, each once."""
        contiguous = torch.contiguous_format
        self.dq_TIJ = torch.empty_like(inputs.q_TIJ, memory_format=contiguous)
        """Type of the queries."""
        self.dk_SJ = torch.zeros(inputs.k_SJ.shape, dtype=torch.float32, device=inputs.k_SJ.device)
        """float32, a sum over chunks."""
        self.dgate_TI = torch.empty_like(inputs.gate_TI, memory_format=contiguous)
        """Type of the gates."""

    def add(self, dscores_TS: Tensor, inputs: DenseInputs, spans_B4: Tensor, first: int) -> None:
        """Take the scores' gradient of the chunk that begins at query `first`."""
        _add_over_keys(self.dq_TIJ, self.dgate_TI, dscores_TS, inputs, spans_B4, first)
        _add_over_queries(self.dk_SJ, dscores_TS, inputs, spans_B4, first)


def _add_over_keys(
    dq_TIJ: Tensor,
    dgate_TI: Tensor,
    dscores_TS: Tensor,
    inputs: DenseInputs,
    spans_B4: Tensor,
    first: int,
) -> None:
    """Write the rows of dq and dgate that belong to the chunk."""
    blocks = inputs.blocks(QUERY_BLOCKS)
    num_rows, (_, num_keys) = len(dscores_TS), inputs.sizes()
    _query_gradient_kernel[(inputs.q_TIJ.shape[1], triton.cdiv(num_rows, blocks.rows))](
        *inputs.score_arguments(),
        spans_B4,
        dscores_TS,
        dq_TIJ,
        dgate_TI,
        first,
        first + num_rows,
        num_keys,
        dscores_TS.stride(0),
        inputs.q_TIJ.shape[2] ** -0.5,
        **inputs.indexer_constants(),
        **launch_constants(blocks),
    )


def _add_over_queries(
    dk_SJ: Tensor, dscores_TS: Tensor, inputs: DenseInputs, spans_B4: Tensor, first: int
) -> None:
    """Add the chunk's part of dk."""
    blocks = inputs.blocks(KEY_BLOCKS)
    num_rows, (_, num_keys) = len(dscores_TS), inputs.sizes()
    q_TIJ, k_SJ, gate_TI = inputs[:3]
    rows = slice(first, first + num_rows)
    # Gates belong to the second factor: the first is then the scores' gradient as it stands.
    gated_TIJ = q_TIJ[rows].float() * (gate_TI[rows].float() * q_TIJ.shape[2] ** -0.5)[:, :, None]
    _key_gradient_kernel[(triton.cdiv(num_keys, blocks.keys),)](
        q_TIJ,
        k_SJ,
        gated_TIJ.to(dscores_TS.dtype),
        *q_TIJ.stride()[:2],
        k_SJ.stride(0),
        spans_B4,
        dscores_TS,
        dk_SJ,
        first,
        first + num_rows,
        num_keys,
        dscores_TS.stride(0),
        **inputs.indexer_constants(),
        **launch_constants(blocks),
    )


@triton.jit
def _query_gradient_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    spans: tl.tensor,
    dscores: tl.tensor,
    dq: tl.tensor,
    dgate: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    dscores_stride_t: int,
    score_scale: float,
    INDEXER_HEADS: tl.constexpr,
    INDEXER_CHANNELS: tl.constexpr,
    PADDED_INDEXER_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    score_scale = tl.cast(score_scale, tl.float32)  # torch.compile gives float64
    head = tl.program_id(0)
    query, local, is_query = locate_block(tl.program_id(1), first, last, BLOCK_T)
    place = tl.arange(0, BLOCK_S)
    q_head = q + head * q_stride_i
    q_tile = load_block(
        q_head, q_stride_t, query, is_query, INDEXER_CHANNELS, PADDED_INDEXER_CHANNELS
    )
    corner = dscores + (query - first) * dscores_stride_t
    offset = local[:, None] * dscores_stride_t + place[None, :]
    sums = tl.zeros([BLOCK_T, PADDED_INDEXER_CHANNELS], tl.float32)
    span = spans + query // TILE * 4
    for key in range(tl.load(span) // BLOCK_S * BLOCK_S, tl.load(span + 1), BLOCK_S):
        is_key = place < num_keys - key
        k_tile = load_block(k, k_stride_s, key, is_key, INDEXER_CHANNELS, PADDED_INDEXER_CHANNELS)
        dscore = tl.load(corner + key + offset, is_query[:, None], other=0.0)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        passed = tl.where(dots > 0, dscore, 0.0)
        sums = tl.dot(passed, k_tile.to(passed.dtype), sums, input_precision="ieee")
    # The gate's gradient, sum of dscore * relu(q . k) over keys, is q times the same sums.
    sums *= score_scale
    dweight = tl.sum(q_tile.to(tl.float32) * sums, 1)
    gate_rows = gate + query * gate_stride_t + head * gate_stride_i
    weight = tl.load(gate_rows + local * gate_stride_t, is_query, other=0.0).to(tl.float32)
    row = (query + local) * INDEXER_HEADS + head
    tl.store(dgate + row, dweight.to(dgate.dtype.element_ty), is_query)
    store_rows(
        dq,
        row * INDEXER_CHANNELS,
        weight[:, None] * sums,
        is_query,
        INDEXER_CHANNELS,
        PADDED_INDEXER_CHANNELS,
    )


@triton.jit
def _key_gradient_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gated: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    spans: tl.tensor,
    dscores: tl.tensor,
    dk: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    dscores_stride_t: int,
    INDEXER_HEADS: tl.constexpr,
    INDEXER_CHANNELS: tl.constexpr,
    PADDED_INDEXER_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    key, place, is_key = locate_block(tl.program_id(0), 0, num_keys, BLOCK_S)
    local = tl.arange(0, BLOCK_T)
    k_tile = load_block(k, k_stride_s, key, is_key, INDEXER_CHANNELS, PADDED_INDEXER_CHANNELS)
    dk_tile = tl.zeros([BLOCK_S, PADDED_INDEXER_CHANNELS], tl.float32)
    for start in range(first, last, BLOCK_T):
        if is_spanned(spans, start, key, TILE, BLOCK_S):
            query = tl.cast(start, tl.int64)
            is_query = local < last - start
            corner = dscores + (query - first) * dscores_stride_t + key
            places = corner + local[:, None] * dscores_stride_t + place[None, :]
            # Keys as rows: the products then stay in registers as the next one's first factor.
            dscore = tl.trans(tl.load(places, is_query[:, None], other=0.0))
            for head in range(INDEXER_HEADS):
                q_tile = load_rows(
                    q + query * q_stride_t + head * q_stride_i,
                    local * q_stride_t,
                    is_query,
                    INDEXER_CHANNELS,
                    PADDED_INDEXER_CHANNELS,
                )
                gated_tile = load_rows(
                    gated + ((query - first) * INDEXER_HEADS + head) * INDEXER_CHANNELS,
                    local * (INDEXER_HEADS * INDEXER_CHANNELS),
                    is_query,
                    INDEXER_CHANNELS,
                    PADDED_INDEXER_CHANNELS,
                )
                dots = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                passed = tl.where(dots > 0, dscore, 0.0)
                dk_tile = tl.dot(passed, gated_tile, dk_tile, input_precision="ieee")
    dk_rows, offset = dk + key * INDEXER_CHANNELS, place * INDEXER_CHANNELS
    dk_tile += load_rows(dk_rows, offset, is_key, INDEXER_CHANNELS, PADDED_INDEXER_CHANNELS)
    store_rows(dk_rows, offset, dk_tile, is_key, INDEXER_CHANNELS, PADDED_INDEXER_CHANNELS)
