"""The warm-up's loss in Triton, forward: three passes over tiles of queries and keys.

The attention's log-sum-exp comes first, since a mean over heads needs every head's own. Then a
program takes one tile, adds up the heads' weights and the indexer's scores in registers, and
leaves a few numbers for each of its queries. Queries are streamed, a group's keys stay: eight
heads share them. Rows come in chunks small enough that their queries stay in the L2 cache.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries, N blocks of keys.
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
"""Bytes of one chunk's gradient of the scores; 2,048 rows of 128K keys."""
LSE_BLOCKS = Blocks(rows=128, keys=128, warps=8, stages=3)
VALUE_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=2)
FLOAT32_BLOCKS = Blocks(rows=32, keys=32, warps=4, stages=1)
_MOST_CHANNELS = 256


class DenseInputs(NamedTuple):
    """What the loss is computed from; channels adjacent."""

    q_TIJ: Tensor
    k_SJ: Tensor
    gate_TI: Tensor
    query_THC: Tensor
    key_SGC: Tensor
    key_start_T: Tensor
    key_end_T: Tensor

    def checked(self) -> "DenseInputs":
        """Return the inputs as the kernels read them.

        Raises:
            ValueError: More channels than the kernels take, or types that they do not take.
        """
        named = self._asdict()
        floats = {name: named[name] for name in self._fields[:5]}
        check_triton("dense_indexer_loss", self.q_TIJ, **floats)
        most = max(self.q_TIJ.shape[2], self.query_THC.shape[2])
        if most > _MOST_CHANNELS:
            raise ValueError(
                f"dense_indexer_loss: got heads of {most} channels, expected at most "
                f"{_MOST_CHANNELS} with impl 'triton'; take impl='eager'"
            )
        heads = {n: adjacent_channels(t) for n, t in floats.items() if n != "gate_TI"}
        ranges = {n: named[n].contiguous() for n in ("key_start_T", "key_end_T")}
        return self._replace(**heads, **ranges)

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


def span_tiles(key_start_T: Tensor, key_end_T: Tensor, num_keys: int) -> Tensor:
    """Return spans_B4, int32: the keys that any query of a tile sees, and those that all see.

    Args:
        key_start_T: First visible key.
        key_end_T: One past the last visible key.
        num_keys: S.
    """
    is_empty_T = key_start_T >= key_end_T
    fill = -len(key_start_T) % TILE_QUERIES

    def tiles(bound_T: Tensor, of_empty: int, of_none: int) -> Tensor:
        bound_T = bound_T.masked_fill(is_empty_T, of_empty)
        return torch.nn.functional.pad(bound_T, (0, fill), value=of_none).view(-1, TILE_QUERIES)

    spans = [
        tiles(key_start_T, num_keys, num_keys).amin(1),
        tiles(key_end_T, 0, 0).amax(1),
        tiles(key_start_T, num_keys, 0).amax(1),
        tiles(key_end_T, 0, num_keys).amin(1),
    ]
    return torch.stack(spans, dim=1).int()


def query_chunks(num_queries: int, num_keys: int) -> Iterator[tuple[int, int]]:
    """Yield first and last query (exclusive) of each chunk; chunks consist of whole tiles."""
    num_tiles = max(1, CHUNK_BYTES // (2 * TILE_QUERIES * max(1, num_keys)))
    for first in range(0, num_queries, num_tiles * TILE_QUERIES):
        yield first, min(num_queries, first + num_tiles * TILE_QUERIES)


def attention_lse(inputs: DenseInputs, spans_B4: Tensor, *, scale: float) -> Tensor:
    """Return lse_TH, float32 log2 of each head's sum of exponentials; +inf without any key.

    Args:
        inputs: From `checked`.
        spans_B4: From `span_tiles`.
        scale: Factor of the logits.
    """
    blocks = inputs.blocks(LSE_BLOCKS)
    num_queries, num_keys = inputs.sizes()
    num_heads = inputs.query_THC.shape[1]
    lse_TH = inputs.query_THC.new_empty((num_queries, num_heads), dtype=torch.float32)
    constants = inputs.constants()
    _lse_kernel[(triton.cdiv(num_queries, blocks.rows), num_heads)](
        *inputs.attention_arguments(),
        inputs.key_start_T,
        inputs.key_end_T,
        spans_B4,
        lse_TH,
        num_queries,
        num_keys,
        scale * math.log2(math.e),
        **{name: constants[name] for name in ("HEADS", "CHANNELS", "PADDED_CHANNELS")},
        TILE=TILE_QUERIES,
        BLOCK_T=blocks.rows,
        BLOCK_S=blocks.keys,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        maxnreg=blocks.registers,
    )
    return lse_TH


def dense_divergence(
    inputs: DenseInputs, spans_B4: Tensor, lse_TH: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return kl_TG, and float32 log-sum-exp of the indexer's scores [T], +inf without any key.

    Args:
        inputs: From `checked`.
        spans_B4: From `span_tiles`.
        lse_TH: From `attention_lse`.
        scale: Factor of the attention's logits.
    """
    blocks = inputs.blocks(VALUE_BLOCKS)
    num_queries, num_keys = inputs.sizes()
    num_groups = inputs.key_SGC.shape[1]
    num_blocks = triton.cdiv(num_keys, blocks.keys)
    kl_TG = lse_TH.new_empty((num_queries, num_groups))
    score_lse_T = lse_TH.new_empty(num_queries)
    for first, last in query_chunks(num_queries, num_keys):
        terms_NTG = lse_TH.new_empty((num_blocks, last - first, num_groups))
        lse_NT = lse_TH.new_empty((num_blocks, last - first))
        _value_kernel[(triton.cdiv(last - first, blocks.rows), num_blocks)](
            *inputs.score_arguments(),
            *inputs.attention_arguments(),
            inputs.key_start_T,
            inputs.key_end_T,
            spans_B4,
            lse_TH,
            terms_NTG,
            lse_NT,
            first,
            last,
            num_keys,
            scale * math.log2(math.e),
            inputs.q_TIJ.shape[2] ** -0.5,
            **inputs.constants(),
            TILE=TILE_QUERIES,
            BLOCK_T=blocks.rows,
            BLOCK_S=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
        lse_T = torch.logsumexp(lse_NT, dim=0)
        has_keys_T = lse_T > -torch.inf
        kl_TG[first:last] = terms_NTG.sum(0) + lse_T.where(has_keys_T, 0)[:, None]
        score_lse_T[first:last] = lse_T.where(has_keys_T, torch.inf)
    return kl_TG, score_lse_T


@triton.jit
def load_ranges(
    key_start: tl.tensor,
    key_end: tl.tensor,
    local: tl.tensor,
    is_query: tl.tensor,
    first_key: tl.tensor,
) -> tl.tensor:
    """Return each query's range, counted from `first_key`; an empty one where no query is."""
    start = tl.load(key_start + local, is_query, other=first_key) - first_key
    end = tl.load(key_end + local, is_query, other=first_key) - first_key
    return start.to(tl.int32), end.to(tl.int32)


@triton.jit
def is_spanned(
    spans: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tl.tensor:
    """Return whether the tile of a query may see any key of the block that begins at `key`."""
    span = spans + query // TILE * 4
    return (key < tl.load(span + 1)) & (key + BLOCK_S > tl.load(span))


@triton.jit
def sum_weights(
    query_rows: tl.tensor,
    lse_rows: tl.tensor,
    key_tile: tl.tensor,
    local: tl.tensor,
    is_query: tl.tensor,
    sums: tl.tensor,
    factor: tl.tensor,
    query_stride_t: int,
    query_stride_h: int,
    scale_log2: float,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return sums + factor * the weights of a group's heads; any value outside the ranges."""
    for head in range(HEADS):
        query_tile = load_rows(
            query_rows + head * query_stride_h,
            local * query_stride_t,
            is_query,
            CHANNELS,
            PADDED_CHANNELS,
        )
        lse = tl.load(lse_rows + head + local * ALL_HEADS, is_query, other=float("inf"))
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")
        sums += factor[:, None] * tl.exp2(logits * scale_log2 - lse[:, None])
    return sums


@triton.jit
def _fold_keys(
    top: tl.tensor,
    total: tl.tensor,
    query_tile: tl.tensor,
    key_group: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_keys: int,
    key_stride_s: int,
    scale_log2: float,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
) -> tl.tensor:
    """Return the largest logit so far and the sum of exponentials below it, for more keys."""
    place = tl.arange(0, BLOCK_S)
    for begin in range(first, last, BLOCK_S):
        key_tile = load_rows(
            key_group + tl.cast(begin, tl.int64) * key_stride_s,
            place * key_stride_s,
            place < num_keys - begin,
            CHANNELS,
            PADDED_CHANNELS,
        )
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale_log2
        if not ALL_VISIBLE:
            key = (begin + place)[None, :]
            logits = tl.where(
                (key >= start[:, None]) & (key < end[:, None]), logits, -float("inf")
            )
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    return top, total


@triton.jit
def _lse_kernel(
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    query_stride_t: int,
    query_stride_h: int,
    key_stride_s: int,
    key_stride_g: int,
    key_start: tl.tensor,
    key_end: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    num_queries: int,
    num_keys: int,
    scale_log2: float,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    # The last rows of a causal sequence are the longest; started first, they leave no tail.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    query = block * BLOCK_T
    local = tl.arange(0, BLOCK_T)
    is_query = local < num_queries - query
    query_tile = load_rows(
        query_heads + head * query_stride_h + query * query_stride_t,
        local * query_stride_t,
        is_query,
        CHANNELS,
        PADDED_CHANNELS,
    )
    key_group = key_heads + head // HEADS * key_stride_g
    start, end = load_ranges(key_start + query, key_end + query, local, is_query, 0)
    span = spans + query // TILE * 4
    first = tl.load(span) // BLOCK_S * BLOCK_S
    last = tl.cdiv(tl.load(span + 1), BLOCK_S) * BLOCK_S
    # Between these two every query sees every key.
    inner = tl.minimum(tl.maximum(tl.cdiv(tl.load(span + 2), BLOCK_S) * BLOCK_S, first), last)
    outer = tl.maximum(tl.load(span + 3) // BLOCK_S * BLOCK_S, inner)
    # Finite, so that a row without any key meets no inf - inf.
    top = tl.full([BLOCK_T], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for part in tl.static_range(3):
        begin = first if part == 0 else (inner if part == 1 else outer)
        stop = inner if part == 0 else (outer if part == 1 else last)
        top, total = _fold_keys(
            top,
            total,
            query_tile,
            key_group,
            start,
            end,
            begin,
            stop,
            num_keys,
            key_stride_s,
            scale_log2,
            CHANNELS,
            PADDED_CHANNELS,
            BLOCK_S,
            ALL_VISIBLE=part == 1,
        )
    row_lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    num_heads = tl.num_programs(1)
    tl.store(lse + query * num_heads + head + local * num_heads, row_lse, is_query)


@triton.jit
def _value_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    query_stride_t: int,
    query_stride_h: int,
    key_stride_s: int,
    key_stride_g: int,
    key_start: tl.tensor,
    key_end: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    terms: tl.tensor,
    score_lse: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    scale_log2: float,
    score_scale: float,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    INDEXER_HEADS: tl.constexpr,
    INDEXER_CHANNELS: tl.constexpr,
    PADDED_INDEXER_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    query = first + tl.program_id(0).to(tl.int64) * BLOCK_T
    key = tl.program_id(1).to(tl.int64) * BLOCK_S
    local, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    is_query, is_key = local < last - query, place < num_keys - key
    row = tl.program_id(1).to(tl.int64) * (last - first) + query - first + local
    if is_spanned(spans, query, key, TILE, BLOCK_S):
        k_tile = load_rows(
            k + key * k_stride_s,
            place * k_stride_s,
            is_key,
            INDEXER_CHANNELS,
            PADDED_INDEXER_CHANNELS,
        )
        scores = score_scale * score_tile(
            q + query * q_stride_t,
            gate + query * gate_stride_t,
            k_tile,
            local,
            is_query,
            q_stride_t,
            q_stride_i,
            gate_stride_t,
            gate_stride_i,
            INDEXER_HEADS,
            INDEXER_CHANNELS,
            PADDED_INDEXER_CHANNELS,
        )
        start, end = load_ranges(key_start + query, key_end + query, local, is_query, key)
        is_visible = (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        visible = tl.where(is_visible, scores, -float("inf"))
        top = tl.max(visible, 1)
        top = tl.where(top > -float("inf"), top, 0.0)
        total = tl.sum(tl.exp(visible - top[:, None]), 1)
        tl.store(score_lse + row, top + tl.log(total), is_query)
        share = tl.full([BLOCK_T], 1.0 / HEADS, tl.float32)
        for group in range(GROUPS):
            key_tile = load_rows(
                key_heads + key * key_stride_s + group * key_stride_g,
                place * key_stride_s,
                is_key,
                CHANNELS,
                PADDED_CHANNELS,
            )
            target = sum_weights(
                query_heads + query * query_stride_t + group * HEADS * query_stride_h,
                lse + (query * GROUPS + group) * HEADS,
                key_tile,
                local,
                is_query,
                tl.zeros([BLOCK_T, BLOCK_S], tl.float32),
                share,
                query_stride_t,
                query_stride_h,
                scale_log2,
                HEADS,
                GROUPS * HEADS,
                CHANNELS,
                PADDED_CHANNELS,
            )
            # 0 log 0 is 0.
            is_wanted = is_visible & (target > 0)
            log_target = tl.log(tl.where(is_wanted, target, 1.0))
            divergence = tl.where(is_wanted, target * (log_target - scores), 0.0)
            tl.store(terms + row * GROUPS + group, tl.sum(divergence, 1), is_query)
    else:
        nothing = tl.zeros([BLOCK_T], tl.float32)
        tl.store(score_lse + row, nothing - float("inf"), is_query)
        for group in range(GROUPS):
            tl.store(terms + row * GROUPS + group, nothing, is_query)
