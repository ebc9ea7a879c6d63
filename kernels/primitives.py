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
    """Return [rows, PADDED_CHANNELS]: adjacent channels from `offset` on, 0 where not real.

    Offsets from a near base can be int32, which takes half the registers.
    """
    channel = tl.arange(0, PADDED_CHANNELS)
    is_real = is_row[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(base + offset[:, None] + channel[None, :], is_real, other=0.0)


@triton.jit
def score_tile(
    q_rows: tl.tensor,
    gate_rows: tl.tensor,
    k_tile: tl.tensor,
    local: tl.tensor,
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

    Walks the heads, so that their sum never leaves a thread. `local` counts queries from the one
    at which `q_rows` and `gate_rows` point.
    """
    scores = tl.zeros([local.shape[0], k_tile.shape[0]], tl.float32)
    for head in range(HEADS):
        q_tile = load_rows(
            q_rows + head * q_stride_i, local * q_stride_t, is_query, CHANNELS, PADDED_CHANNELS
        )
        gate_places = gate_rows + head * gate_stride_i + local * gate_stride_t
        weight = tl.load(gate_places, is_query, other=0.0).to(tl.float32)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores += weight[:, None] * tl.maximum(dots, 0.0)
    return scores
