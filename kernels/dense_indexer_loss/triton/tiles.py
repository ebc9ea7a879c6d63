# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the warm-up's loss share: inputs, tiles, their scores and targets.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks, adjacent_channels, check_triton, padded
from megatron_keye.kernels.primitives import load_rows, score_tile

TILE_QUERIES = 128
"""Queries whose ranges are joined: what none of them sees is skipped. Blocks divide it."""
CHUNK_BYTES = 2**29
"""Bytes of one chunk's gradient of the scores: 2,048 rows of 128K keys; half as many take 9 % more
time."""
FLOAT32_BLOCKS = Blocks(rows=32, keys=32, warps=4, stages=1)
WIDEST_BLOCK = 128
"""Keys of the widest block; a row of the scores' gradient is a multiple of it."""
LN_2 = tl.constexpr(math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))
_MAX_CHANNELS = 256


class DenseInputs(NamedTuple):
    """What the loss is computed from; channels adjacent."""

    q_TIJ: Tensor
    k_SJ: Tensor
    gate_TI: Tensor
    query_THC: Tensor
    key_SGC: Tensor
    key_start_T: Tensor
    key_end_T: Tensor
    key_reach_S: Tensor | None

    def checked(self) -> "DenseInputs":
        """Return the inputs as the kernels read them.

        Raises:
            ValueError: More channels than the kernels take, or types that they do not take.
        """
        named = self._asdict()
        floats = {name: named[name] for name in self._fields[:5]}
        check_triton("dense_indexer_loss", self.q_TIJ, **floats)
        most = max(self.q_TIJ.shape[2], self.query_THC.shape[2])
        if most > _MAX_CHANNELS:
            raise ValueError(
                f"dense_indexer_loss: got heads of {most} channels, expected at most "
                f"{_MAX_CHANNELS} with impl 'triton'; take impl='eager'"
            )
        heads = {name: _near_rows(tensor) for name, tensor in floats.items()}
        ranges = {n: named[n].contiguous() for n in ("key_start_T", "key_end_T")}
        reach_S = None if self.key_reach_S is None else self.key_reach_S.contiguous()
        return self._replace(**heads, **ranges, key_reach_S=reach_S)

    def sizes(self) -> tuple[int, int]:
        """Return T and S."""
        return self.q_TIJ.shape[0], self.k_SJ.shape[0]

    def score_arguments(self) -> tuple[Tensor | int, ...]:
        """Return what a kernel needs for the indexer's scores."""
        q, k, gate = self[:3]
        return q, k, gate, *q.stride()[:2], k.stride(0), *gate.stride()

    def attention_arguments(self) -> tuple[Tensor | int, ...]:
        """Return what a kernel needs for the attention's weights."""
        query, key = self[3:5]
        return query, key, *query.stride()[:2], *key.stride()[:2]

    def range_arguments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what a kernel needs for the visible keys."""
        return self.key_start_T, self.key_end_T, self.key_reach_S

    def constants(self) -> dict[str, int]:
        """Return the sizes that kernels are compiled for."""
        (_, heads, channels), (_, groups, _) = self.query_THC.shape, self.key_SGC.shape
        return {
            "GROUPS": groups,
            "HEADS": heads // groups,
            "CHANNELS": channels,
            "PADDED_CHANNELS": padded(channels),
            **self.indexer_constants(),
        }

    def indexer_constants(self) -> dict[str, int]:
        """Return those of the indexer alone."""
        _, heads, channels = self.q_TIJ.shape
        return {
            "INDEXER_HEADS": heads,
            "INDEXER_CHANNELS": channels,
            "PADDED_INDEXER_CHANNELS": padded(channels),
        }

    def blocks(self, tuned: Blocks) -> Blocks:
        """Return the cut of the work: `tuned`, or the one for float32 if any input is that."""
        is_wide = any(tensor.dtype == torch.float32 for tensor in (self.q_TIJ, self.query_THC))
        return FLOAT32_BLOCKS if is_wide else tuned


def _near_rows(tensor: Tensor) -> Tensor:
    """Return `tensor` with offsets within a tile that fit int32, copied only when they do not."""
    tensor = adjacent_channels(tensor)
    extents = [TILE_QUERIES * tensor.stride(0), tensor.shape[1] * tensor.stride(1)]
    return tensor if max(extents) < 2**31 else tensor.contiguous()


def query_chunks(num_queries: int, num_keys: int) -> Iterator[tuple[int, int]]:
    """Yield first and last query (exclusive) of each chunk; chunks consist of whole tiles."""
    num_tiles = max(1, CHUNK_BYTES // (2 * TILE_QUERIES * max(1, num_keys)))
    for first in range(0, num_queries, num_tiles * TILE_QUERIES):
        yield first, min(num_queries, first + num_tiles * TILE_QUERIES)


def launch_constants(blocks: Blocks) -> dict[str, int | None]:
    """Return the compile-time arguments that cut the work."""
    return {
        "TILE": TILE_QUERIES,
        "BLOCK_T": blocks.rows,
        "BLOCK_S": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


@triton.jit
def locate_block(
    block: tl.tensor, first: tl.tensor, last: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Return where a block of queries or keys begins, the places in it, and which of them exist.

    Blocks are counted from `first`; `last` is one past the end. The beginning is int64, so that
    its product with a stride is too.
    """
    start = first + block.to(tl.int64) * SIZE
    place = tl.arange(0, SIZE)
    return start, place, place < last - start


@triton.jit
def load_block(
    rows: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    is_row: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return the rows of the block that begins at `start`; offsets within it are int32."""
    place = tl.arange(0, is_row.shape[0])
    rows += tl.cast(start, tl.int64) * stride
    return load_rows(rows, place * stride, is_row, CHANNELS, PADDED_CHANNELS)


@triton.jit
def score_block(
    indexer: tl.tuple,
    query: tl.tensor,
    key: tl.tensor,
    is_query: tl.tensor,
    is_key: tl.tensor,
    scale_log2: float,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return the scores, in powers of two, of the block that begins at `query` and `key`.

    `indexer` holds what `DenseInputs.score_arguments` gives a kernel.
    """
    q, k, gate, q_stride_t, q_stride_i, k_stride_s, gate_stride_t, gate_stride_i = indexer
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    return scale_log2 * score_tile(
        q + query * q_stride_t,
        gate + query * gate_stride_t,
        load_block(k, k_stride_s, key, is_key, CHANNELS, PADDED_CHANNELS),
        tl.arange(0, is_query.shape[0]),
        is_query,
        q_stride_t,
        q_stride_i,
        gate_stride_t,
        gate_stride_i,
        HEADS,
        CHANNELS,
        PADDED_CHANNELS,
    )


@triton.jit
def mean_weights(
    attention: tl.tuple,
    lse: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    group: tl.tensor,
    is_query: tl.tensor,
    is_key: tl.tensor,
    scale_log2: float,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return the mean of a group's weights over its heads, of the block at `query` and `key`.

    `attention` holds what `DenseInputs.attention_arguments` gives a kernel. Outside the ranges
    any value may come out.
    """
    queries, keys, query_stride_t, query_stride_h, key_stride_s, key_stride_g = attention
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    local = tl.arange(0, is_query.shape[0])
    group_keys = keys + group * key_stride_g
    key_tile = load_block(group_keys, key_stride_s, key, is_key, CHANNELS, PADDED_CHANNELS)
    group_queries = queries + group * HEADS * query_stride_h
    lse_rows = lse + (query * GROUPS + group) * HEADS
    mean = tl.zeros([is_query.shape[0], is_key.shape[0]], tl.float32)
    share = tl.full([local.shape[0]], 1.0 / HEADS, tl.float32)
    for head in range(HEADS):
        head_queries = group_queries + head * query_stride_h
        query_tile = load_block(
            head_queries, query_stride_t, query, is_query, CHANNELS, PADDED_CHANNELS
        )
        head_lse = tl.load(
            lse_rows + head + local * (GROUPS * HEADS), is_query, other=float("inf")
        )
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")
        mean += share[:, None] * tl.exp2(logits * scale_log2 - head_lse[:, None])
    return mean
