# SPDX-License-Identifier: Apache-2.0
"""A packed selection comes out as it went in."""

import pytest
import torch

from megatron_keye.decoder.recomputation import PackedSelection

EDGES = [0, 1, 32_767, 32_768, 65_535, 65_536, 65_537, 131_071, 131_072, 199_999]


@pytest.mark.parametrize("num_keys", [1, 65_536, 65_537, 200_000])
def test_keys_on_both_sides_of_every_block_come_back(num_keys: int) -> None:
    seen = [key for key in EDGES if key < num_keys]
    rows = [[], [0], seen, seen[-2:], seen[:-1], [num_keys - 1]]
    width = len(EDGES) + 1
    indices_TK = torch.tensor([row + [-1] * (width - len(row)) for row in rows]).int()
    packed = PackedSelection.of(indices_TK, num_keys)
    assert packed.low_TK.dtype == torch.int16
    assert torch.equal(packed.unpack(), indices_TK)
    assert packed.unpack().dtype == torch.int32
