# SPDX-License-Identifier: Apache-2.0
"""Tests of the learned positions' interpolation."""

import torch
from torch.nn import functional

from megatron_keye.vision.positions import interpolate_positions, packed_positions
from tests.support.numerics import assert_close, make_tensor

SIDE, WIDTH = 5, 8


def test_native_size_is_the_table_itself() -> None:
    table = make_tensor(SIDE * SIDE, WIDTH, seed=1)
    assert torch.equal(interpolate_positions(table, (SIDE, SIDE)), table), "identity"


def test_other_sizes_equal_torch_bilinear() -> None:
    table = make_tensor(SIDE * SIDE, WIDTH, seed=2)
    image = table.reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    for patch_grid in [(4, 6), (2, 2), (11, 3)]:
        expected = functional.interpolate(
            image, patch_grid, mode="bilinear", align_corners=False, antialias=False
        )
        stretched = interpolate_positions(table, patch_grid).unflatten(0, patch_grid)
        assert_close(stretched, expected[0].permute(1, 2, 0), 1e-14)


def test_hand_computed_stretch() -> None:
    # A 2 x 2 table that counts columns, stretched to 4 columns: centres at -1/4, 1/4, 3/4, 5/4.
    table = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    assert interpolate_positions(table, (1, 4))[:, 0].tolist() == [0.0, 0.25, 0.75, 1.0], "columns"
    rows = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert interpolate_positions(rows, (4, 1))[:, 0].tolist() == [0.0, 0.25, 0.75, 1.0], "rows"


def test_packed_frames_equal_single_frames_in_the_tables_type() -> None:
    table = make_tensor(SIDE * SIDE, WIDTH, seed=3, dtype=torch.bfloat16)
    patch_grids = [(4, 6), (4, 6), (2, 2), (4, 6)]
    expected = torch.cat([interpolate_positions(table, patch_grid) for patch_grid in patch_grids])
    positions_PW = packed_positions(table, patch_grids)
    assert positions_PW.dtype == torch.bfloat16, "type"
    assert torch.equal(positions_PW, expected), "order of frames"
