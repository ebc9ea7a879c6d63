# SPDX-License-Identifier: Apache-2.0
"""Tests of the union lists: data movement, so every comparison is bitwise."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.union_lists import TILE_QUERIES, UnionLists, union_lists
from tests.support.numerics import device, make_selection, odd_selection

pytestmark = pytest.mark.parametrize("impl", ["eager", "triton"])


def unions_by_sets(indices_TK: Tensor, num_keys: int) -> list[dict[int, int]]:
    """Return the mask of each key of each tile, by Python's sets."""
    tiles = []
    for rows in indices_TK.split(TILE_QUERIES):
        mask_of_key: dict[int, int] = {}
        for bit, row in enumerate(rows.tolist()):
            for key in row:
                if 0 <= key < num_keys:
                    mask_of_key[key] = mask_of_key.get(key, 0) | 1 << bit
        tiles.append(dict(sorted(mask_of_key.items())))
    return tiles


def assert_lists(lists: UnionLists, indices_TK: Tensor, num_keys: int) -> None:
    expected = unions_by_sets(indices_TK, num_keys)
    assert lists.counts_B.tolist() == [len(tile) for tile in expected], "counts"
    for tile, mask_of_key in enumerate(expected):
        keys = lists.keys_BU[tile, : len(mask_of_key)].tolist()
        masks = lists.masks_BU[tile, : len(mask_of_key)].tolist()
        assert keys == list(mask_of_key), "keys, ascending"
        assert [mask & 0xFFFF for mask in masks] == list(mask_of_key.values()), "masks"


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "k"), [(1, 1, 1), (63, 100, 17), (16, 3000, 300), (33, 5, 9)]
)
def test_lists_equal_sets(impl: str, num_queries: int, num_keys: int, k: int) -> None:
    indices_TK = odd_selection(num_queries, num_keys, k, seed=1).to(device(impl))
    assert_lists(union_lists(indices_TK, num_keys, impl=impl), indices_TK, num_keys)
    assert_lists(union_lists(indices_TK.long(), num_keys, impl=impl), indices_TK, num_keys)


def test_padding_and_foreign_entries_are_in_no_union(impl: str) -> None:
    indices_TK = torch.full((35, 4), -1, dtype=torch.int32, device=device(impl))
    indices_TK[3] = torch.tensor([2, 7, 100, 2**31 - 1])
    lists = union_lists(indices_TK, 100, impl=impl)
    assert lists.counts_B.tolist() == [2, 0, 0], "only keys below S"
    assert_lists(lists, indices_TK, 100)


def test_strides_do_not_matter(impl: str) -> None:
    indices_TK = odd_selection(40, 100, 17, seed=2).to(device(impl))
    strided_TK = indices_TK.T.contiguous().T
    assert_lists(union_lists(strided_TK, 100, impl=impl), indices_TK, 100)


def test_no_queries_no_keys_no_places(impl: str) -> None:
    empty = torch.empty(0, 4, dtype=torch.int32, device=device(impl))
    assert union_lists(empty, 9, impl=impl).counts_B.numel() == 0, "no queries"
    padding_TK = torch.full((17, 4), -1, dtype=torch.int32, device=device(impl))
    assert union_lists(padding_TK, 0, impl=impl).counts_B.tolist() == [0, 0], "no keys"
    assert union_lists(padding_TK[:, :0], 9, impl=impl).counts_B.tolist() == [0, 0], "no places"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion ends the process")
@pytest.mark.parametrize("row", [[3, 2, 5], [3, 3, 5], [3, -1, 5]])
def test_rows_that_are_not_ascending_are_refused(impl: str, row: list[int]) -> None:
    indices_TK = torch.tensor([[0, 1, 2], row])
    with pytest.raises(RuntimeError, match="not ascending"):
        union_lists(indices_TK, 9, impl=impl)


def test_misfits_are_named(impl: str) -> None:
    indices_TK = torch.zeros(3, 1, dtype=torch.int32, device=device(impl))
    with pytest.raises(ValueError, match="indices_TK: got torch.float32"):
        union_lists(indices_TK.float(), 9, impl=impl)
    with pytest.raises(ValueError, match="num_keys: got -1"):
        union_lists(indices_TK, -1, impl=impl)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_keys", [32_768, 131_072])
def test_long_rows(impl: str, num_keys: int) -> None:
    indices_TK = make_selection("local", 4096, num_keys, 2048, seed=3).cuda()
    lists = union_lists(indices_TK, num_keys, impl=impl)
    eager = union_lists(indices_TK, num_keys, impl="eager")
    assert torch.equal(lists.counts_B, eager.counts_B), "counts"
    is_used_BU = torch.arange(lists.keys_BU.shape[1], device="cuda") < lists.counts_B[:, None]
    for name in ("keys_BU", "masks_BU"):
        got, wanted = getattr(lists, name), getattr(eager, name)
        assert torch.equal(got.where(is_used_BU, 0), wanted.where(is_used_BU, 0)), name
