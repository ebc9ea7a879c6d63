# SPDX-License-Identifier: Apache-2.0
"""Which keys the queries of a tile see: spans of whole tiles, and the mask of a block.

Shape letters: T queries, S keys, B tiles of queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss.triton.tiles import TILE_QUERIES


def span_tiles(
    key_start_T: Tensor, key_end_T: Tensor, key_reach_S: Tensor | None, num_keys: int
) -> Tensor:
    """Return spans_B4, int32: the keys that any query of a tile sees, and some that all see.

    Args:
        key_start_T: First visible key.
        key_end_T: One past the last visible key.
        key_reach_S: The largest `key_end_T` of a query that sees the key; None where all keys of a
            range are visible.
        num_keys: S, 1 or more.
    """
    is_empty_T = key_start_T >= key_end_T
    fill = -len(key_start_T) % TILE_QUERIES
    whole_end_T = key_end_T
    if key_reach_S is not None:
        whole_end_T = torch.minimum(key_end_T, _trunk_end(key_start_T, key_reach_S))

    def tiles(bound_T: Tensor, of_empty: int, of_none: int) -> Tensor:
        bound_T = bound_T.masked_fill(is_empty_T, of_empty)
        return torch.nn.functional.pad(bound_T, (0, fill), value=of_none).view(-1, TILE_QUERIES)

    spans = [
        tiles(key_start_T, num_keys, num_keys).amin(1),
        tiles(key_end_T, 0, 0).amax(1),
        tiles(key_start_T, num_keys, 0).amax(1),
        tiles(whole_end_T, 0, num_keys).amin(1),
    ]
    return torch.stack(spans, dim=1).int()


def _trunk_end(key_start_T: Tensor, key_reach_S: Tensor) -> Tensor:
    """Return the end of the keys from each start on that are on every path from there."""
    num_keys = len(key_reach_S)
    key_S = torch.arange(num_keys, device=key_reach_S.device)
    is_last_S = torch.ones_like(key_S, dtype=torch.bool)
    is_last_S[:-1] = key_reach_S[1:] != key_reach_S[:-1]
    # The first end at or after each key: the least of all that follow.
    end_S = torch.where(is_last_S, key_S + 1, num_keys).flip(0).cummin(0).values.flip(0)
    return end_S[key_start_T.clamp(0, num_keys - 1)]


@triton.jit
def load_ranges(
    key_start: tl.tensor,
    key_end: tl.tensor,
    query: tl.tensor,
    first_key: tl.tensor,
    is_query: tl.tensor,
) -> tl.tensor:
    """Return each query's range, counted from `first_key`; an empty one where no query is."""
    local = tl.arange(0, is_query.shape[0])
    start = tl.load(key_start + query + local, is_query, other=first_key) - first_key
    end = tl.load(key_end + query + local, is_query, other=first_key) - first_key
    return start.to(tl.int32), end.to(tl.int32)


@triton.jit
def mask_block(
    start: tl.tensor,
    end: tl.tensor,
    key_reach: tl.tensor,
    key: tl.tensor,
    first_key: tl.tensor,
    is_key: tl.tensor,
) -> tl.tensor:
    """Return which keys each query sees, of the block that begins at `key`.

    `start` and `end` are from `load_ranges` with the same `first_key`. `key_reach` is None where
    all keys of a range are visible.
    """
    place = tl.arange(0, is_key.shape[0])
    local = (key - first_key + place).to(tl.int32)[None, :]
    is_visible = (local >= start[:, None]) & (local < end[:, None])
    if key_reach is not None:
        reach = tl.load(key_reach + key + place, is_key, other=0) - first_key
        is_visible = is_visible & (end[:, None] <= reach.to(tl.int32)[None, :])
    return is_visible


@triton.jit
def load_mask(
    key_start: tl.tensor,
    key_end: tl.tensor,
    key_reach: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    is_query: tl.tensor,
    is_key: tl.tensor,
) -> tl.tensor:
    """Return which keys each query sees, of the block that begins at `query` and `key`."""
    start, end = load_ranges(key_start, key_end, query, key, is_query)
    return mask_block(start, end, key_reach, key, key, is_key)


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
