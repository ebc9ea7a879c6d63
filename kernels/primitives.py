"""Triton functions that the kernels of several operators share.

Kept to what reads the same in each of them: a tile of rows, and the indexer's score of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base: tl.tensor,
    offset: tl.tensor,
    is_row: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return [rows, PADDED_CHANNELS]: adjacent channels from `offset` on, 0 where not real."""
    channel = tl.arange(0, PADDED_CHANNELS)
    is_real = is_row[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(base + offset[:, None] + channel[None, :], is_real, other=0.0)


@triton.jit
def score_tile(
    q: tl.tensor,
    gate: tl.tensor,
    k_tile: tl.tensor,
    query: tl.tensor,
    is_query: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    gate_stride_t: int,
    gate_stride_i: int,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return the indexer's scores [queries, keys] before their factor J^-0.5.

    Walks the heads, so that their sum never leaves a thread.
    """
    scores = tl.zeros([query.shape[0], k_tile.shape[0]], tl.float32)
    gate_rows = gate + query * gate_stride_t
    for head in range(HEADS):
        q_tile = load_rows(
            q + head * q_stride_i, query * q_stride_t, is_query, CHANNELS, PADDED_CHANNELS
        )
        weight = tl.load(gate_rows + head * gate_stride_i, is_query, other=0.0).to(tl.float32)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores += weight[:, None] * tl.maximum(dots, 0.0)
    return scores
