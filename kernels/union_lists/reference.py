# SPDX-License-Identifier: Apache-2.0
"""Eager form of the union lists.

It defines the operator: other implementations must return the same integers.

Shape letters: T queries, S keys, K selected keys, B tiles of TILE_QUERIES queries, U places of
a union.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE_QUERIES = 16
"""Queries of a tile: one bit each in a 16-bit word; times 8 heads they fill a tile of 128 rows."""


class UnionLists(NamedTuple):
    """The keys that each tile of neighbouring queries needs."""

    keys_BU: Tensor
    """int32, ascending; only the first counts_B[b] places of a row are specified."""
    masks_BU: Tensor
    """int16: bit i says that query TILE_QUERIES * b + i selects the key; likewise."""
    counts_B: Tensor
    """int32, keys of each union."""


def union_capacity(num_selected: int, num_keys: int) -> int:
    """Return U, the places that a union can need, at least 1."""
    return max(1, min(TILE_QUERIES * num_selected, num_keys))


def check_canonical(is_canonical: Tensor) -> None:
    """Raise, on a GPU asynchronously, unless every row is ascending, distinct and padded last."""
    torch._assert_async(
        is_canonical,
        "indices_TK: got a row that is not ascending with padding last, or repeats a key; "
        "expected rows as select_top_k returns them",
    )


def fake_union_lists(indices_TK: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `union_lists` does, empty, for tracing."""
    num_tiles = -(-indices_TK.shape[0] // TILE_QUERIES)
    capacity = union_capacity(indices_TK.shape[1], num_keys)
    keys_BU = indices_TK.new_empty((num_tiles, capacity), dtype=torch.int32)
    masks_BU = keys_BU.new_empty(keys_BU.shape, dtype=torch.int16)
    return keys_BU, masks_BU, keys_BU.new_empty(num_tiles)


def union_lists(indices_TK: Tensor, num_keys: int) -> UnionLists:
    """Return the union of each tile; see api.union_lists."""
    is_real_TK = (indices_TK >= 0) & (indices_TK < num_keys)
    follows_TK = is_real_TK[:, :-1] & (indices_TK[:, 1:] > indices_TK[:, :-1])
    check_canonical((follows_TK | ~is_real_TK[:, 1:]).all())
    num_queries, num_selected = indices_TK.shape
    num_tiles = -(-num_queries // TILE_QUERIES)
    capacity = union_capacity(num_selected, num_keys)
    keys_BU = indices_TK.new_zeros((num_tiles, capacity), dtype=torch.int32)
    masks_BU = keys_BU.new_zeros(keys_BU.shape, dtype=torch.int16)
    counts_B = keys_BU.new_zeros(num_tiles)
    for tile in range(num_tiles):
        rows = slice(TILE_QUERIES * tile, TILE_QUERIES * (tile + 1))
        query, slot = is_real_TK[rows].nonzero(as_tuple=True)
        keys, place = indices_TK[rows][query, slot].unique(return_inverse=True)
        bits = torch.zeros_like(keys, dtype=torch.int64).index_add_(0, place, 1 << query)
        counts_B[tile] = keys.numel()
        keys_BU[tile, : keys.numel()] = keys.int()
        masks_BU[tile, : keys.numel()] = bits.to(torch.int16)
    return UnionLists(keys_BU, masks_BU, counts_B)
