# SPDX-License-Identifier: Apache-2.0
"""Triton functions that the kernels of several operators share.

Only what is the same in each of them: tiles of rows, loads of a union, the indexer's scores, the
online softmax.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fast_log2(value: tl.tensor) -> tl.tensor:
    """Return the hardware's logarithm, which the interpreter lacks; tl.log2 has 20 instructions.

    Its absolute error is 2^-22 for values between 0.5 and 2, its relative one 2^-22 elsewhere.
    """
    if _INTERPRETED:
        return tl.log2(value)
    else:
        return libdevice.fast_log2f(value)


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
    return tl.load(base + (offset[:, None] + channel[None, :]), is_real, other=0.0)


@triton.jit
def store_rows(
    base: tl.tensor,
    offset: tl.tensor,
    tile: tl.tensor,
    is_row: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> None:
    """Store a tile of rows, in the type of memory, where `load_rows` would load it."""
    channel = tl.arange(0, PADDED_CHANNELS)
    is_real = is_row[:, None] & (channel < CHANNELS)[None, :]
    tl.store(base + (offset[:, None] + channel[None, :]), tile.to(base.dtype.element_ty), is_real)


@triton.jit
def locate_rows(
    num_queries: int,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
) -> tl.tensor:
    """Return a program's rows, query * heads + head, of a tile whose queries share a union.

    Tile, query and head of each row, whether it is real, and its query's place in the tile.
    """
    part = tl.program_id(0)
    row = tl.arange(0, QUERIES * PADDED_HEADS)
    tile = part // (TILE // QUERIES)
    local = part % (TILE // QUERIES) * QUERIES + row // PADDED_HEADS
    query = (tile * TILE + local).to(tl.int64)
    head = row % PADDED_HEADS
    is_row = (query < num_queries) & (head < HEADS)
    return tile.to(tl.int64), query, head, is_row, local


@triton.jit
def load_union(
    keys: tl.tensor,
    masks: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    BLOCK_U: tl.constexpr,
) -> tl.tensor:
    """Return keys (0 past the end), mask words (0 past the end) and which places are real."""
    place = start + tl.arange(0, BLOCK_U)
    is_real = place < count
    key = tl.load(keys + first + place, is_real, other=0).to(tl.int64)
    word = tl.load(masks + first + place, is_real, other=0).to(tl.int32)
    return key, word, is_real


@triton.jit
def selection_slots(word: tl.tensor, local: tl.tensor, num_before: tl.tensor) -> tl.tensor:
    """Return [queries, keys]: the places of a union's keys in each query's row, and which it has.

    Rows are ascending, so that a key's place in its row is the number of selected keys before;
    `num_before` counts those of earlier steps, and is returned for the next one. `word` holds
    the keys' masks, `local` the queries' places in the tile.
    """
    is_selected = (word[None, :] >> local[:, None]) & 1
    slot = num_before[:, None] + tl.cumsum(is_selected, 1) - 1
    return slot, is_selected != 0, num_before + tl.sum(is_selected, 1)


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

    Iterates over the heads, so that their sum never leaves a thread. `local` counts queries from
    the one at which `q_rows` and `gate_rows` point.
    """
    scores = tl.zeros([local.shape[0], k_tile.shape[0]], tl.float32)
    for head in range(HEADS):
        q_tile = load_rows(
            q_rows + head * q_stride_i, local * q_stride_t, is_query, CHANNELS, PADDED_CHANNELS
        )
        gate_places = gate_rows + head * gate_stride_i + local * gate_stride_t
        half_weight = 0.5 * tl.load(gate_places, is_query, other=0.0).to(tl.float32)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        # x + |x| is 2 relu(x), to the bit, at twice the rate that Hopper has for a maximum.
        scores += half_weight[:, None] * (dots + tl.abs(dots))
    return scores


@triton.jit
def online_softmax_update(
    m_i: tl.tensor,
    l_i: tl.tensor,
    acc: tl.tensor,
    logits: tl.tensor,
    value_tile: tl.tensor,
    value_scale: tl.tensor | None = None,
) -> tl.tensor:
    """Add more keys to an online softmax: logits [rows, keys] in powers of two, their values.

    Values of 8 bits come in the type of the products, with the scale [keys] that belongs to each.

    Returns each row's running maximum m_i, which starts finite so that a row without any key
    never computes inf - inf, its running sum of exponentials l_i, and the accumulator of its
    weighted values.

    Source: arXiv 1805.02867 (Milakov and Gimelshein, online softmax).
    """
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    weights = tl.exp2(logits - m_new[:, None])
    rescale = tl.exp2(m_i - m_new)
    l_i = l_i * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    if value_scale is not None:
        weights *= value_scale[None, :]
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
    return m_new, l_i, acc
