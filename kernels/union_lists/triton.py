# SPDX-License-Identifier: Apache-2.0
"""Union lists in Triton: each program marks its tile's keys in a table of S words, then reads it.

The table lies in global memory (in practice in L2), since Triton cannot address shared memory.
A program cleans the words that it finds, so one table serves all its tiles.

Shape letters: T queries, S keys, K selected keys, B tiles of TILE_QUERIES queries, U places of
a union.
"""

from collections.abc import MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.registration import is_traced, opaque
from megatron_keye.kernels.union_lists.reference import (
    TILE_QUERIES,
    UnionLists,
    check_canonical,
    fake_union_lists,
    union_capacity,
)

_PROGRAMS = 528
"""Four per multiprocessor of an H100; each owns a table of S words."""
_TABLE_BYTES = 512 * 2**20
"""Budget of all tables; a million keys leave 128 programs."""
_BLOCK_K, _BLOCK_S = 256, 1024
_remembered: MutableMapping[Tensor, tuple[int, int, UnionLists]] = WeakTensorKeyDictionary()
"""Selection -> (its version, S, its lists), while the selection lives.

The attention and the indexer's loss of a layer read the same unions, forward and backward.
"""


def union_lists(indices_TK: Tensor, num_keys: int) -> UnionLists:
    """Return the union of each tile; see api.union_lists. A selection is merged once."""
    if is_traced(indices_TK):
        return UnionLists(*_merge(indices_TK, num_keys))
    known = _remembered.get(indices_TK)
    if known is not None and known[:2] == (indices_TK._version, num_keys):
        return known[2]
    lists = UnionLists(*_merge(indices_TK, num_keys))
    _remembered[indices_TK] = indices_TK._version, num_keys, lists
    return lists


@opaque("merge_unions_in_triton", fake_union_lists)
def _merge(indices_TK: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel."""
    check_triton("union_lists", indices_TK)
    num_queries, num_selected = indices_TK.shape
    num_tiles = -(-num_queries // TILE_QUERIES)
    capacity = union_capacity(num_selected, num_keys)
    keys_BU = indices_TK.new_empty((num_tiles, capacity), dtype=torch.int32)
    masks_BU = keys_BU.new_empty(keys_BU.shape, dtype=torch.int16)
    counts_B = keys_BU.new_empty(num_tiles)
    if num_tiles == 0 or num_selected == 0 or num_keys == 0:
        return keys_BU, masks_BU, counts_B.zero_()
    num_programs = min(num_tiles, _PROGRAMS, max(1, _TABLE_BYTES // (4 * num_keys)))
    table = keys_BU.new_zeros((num_programs, num_keys))
    is_canonical = keys_BU.new_ones(1)
    _union_kernel[(num_programs,)](
        indices_TK,
        table,
        keys_BU,
        masks_BU,
        counts_B,
        is_canonical,
        num_queries,
        num_selected,
        num_keys,
        num_tiles,
        capacity,
        *indices_TK.stride(),
        TILE=TILE_QUERIES,
        BLOCK_K=_BLOCK_K,
        BLOCK_S=_BLOCK_S,
        num_warps=8,
    )
    check_canonical(is_canonical)
    return keys_BU, masks_BU, counts_B


@triton.jit
def _union_kernel(
    indices: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    is_canonical: tl.tensor,
    num_queries: int,
    num_selected: int,
    num_keys: int,
    num_tiles: int,
    capacity: int,
    stride_t: int,
    stride_k: int,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    words = table + program.to(tl.int64) * num_keys
    local = tl.arange(0, TILE)
    num_programs = tl.num_programs(0)
    for step in range(0, tl.cdiv(num_tiles - program, num_programs)):
        tile = program + step * num_programs
        query = tile * TILE + local
        rows = indices + query.to(tl.int64)[:, None] * stride_t
        is_query = (query < num_queries)[:, None]
        low = num_keys
        high = -1
        for start in range(0, num_selected, BLOCK_K):
            slot = start + tl.arange(0, BLOCK_K)[None, :]
            index = tl.load(rows + slot * stride_k, is_query & (slot < num_selected), other=-1)
            has_next = is_query & (slot + 1 < num_selected)
            after = tl.load(rows + (slot + 1) * stride_k, has_next, other=-1)
            is_real = (index >= 0) & (index < num_keys)
            is_wrong = (after >= 0) & (after < num_keys) & ((after <= index) | (index < 0))
            if tl.max(is_wrong.to(tl.int32)) > 0:
                tl.store(is_canonical, 0)
            tl.atomic_or(words + index, (1 << local)[:, None] + index * 0, is_real, sem="relaxed")
            low = tl.minimum(low, tl.min(tl.where(is_real, index, num_keys)).to(tl.int32))
            high = tl.maximum(high, tl.max(tl.where(is_real, index, -1)).to(tl.int32))
        tl.debug_barrier()
        first = tile.to(tl.int64) * capacity
        count = 0
        for start in range(low // BLOCK_S * BLOCK_S, high + 1, BLOCK_S):
            key = start + tl.arange(0, BLOCK_S)
            # Past L1, which the atomic operations did not update.
            word = tl.load(words + key, key <= high, other=0, cache_modifier=".cg")
            is_needed = word != 0
            place = first + count + tl.cumsum(is_needed.to(tl.int32)) - 1
            tl.store(keys + place, key, is_needed)
            tl.store(masks + place, word.to(tl.int16), is_needed)
            tl.store(words + key, 0, is_needed)
            count += tl.sum(is_needed.to(tl.int32))
        tl.store(counts + tile, count)
        tl.debug_barrier()
