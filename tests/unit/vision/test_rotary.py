# SPDX-License-Identifier: Apache-2.0
"""Tests of the patches' 2-D rotary positions."""

import math

import torch

from megatron_keye.kernels.rotary import rotate
from megatron_keye.vision.rotary import patch_coordinates, rotary_tables
from tests.support.numerics import assert_close, make_tensor

CPU = torch.device("cpu")


def test_coordinates_restart_in_every_frame() -> None:
    rows_P, columns_P = patch_coordinates([(2, 3), (1, 2)], CPU)
    assert rows_P.tolist() == [0, 0, 0, 1, 1, 1, 0, 0], "rows"
    assert columns_P.tolist() == [0, 1, 2, 0, 1, 2, 0, 1], "columns"


def test_angles_of_a_hand_computed_case() -> None:
    cos_PC, sin_PC = rotary_tables([(2, 3)], 8, 100.0, dtype=torch.float64, device=CPU)
    # Frequencies of 8 / 4 = 2 an axis: 1 and 100^-0.5 = 0.1; the last patch is row 1, column 2.
    angles = [1.0, 0.1, 2.0, 0.2] * 2
    expected_cos, expected_sin = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
    assert_close(cos_PC[5], torch.tensor(expected_cos, dtype=torch.float64), 1e-15)
    assert_close(sin_PC[5], torch.tensor(expected_sin, dtype=torch.float64), 1e-15)


def test_rotation_of_a_hand_computed_case() -> None:
    # Row 0, column 1: the row planes (0, 4) and (1, 5) stay, the column planes (2, 6) and (3, 7)
    # turn by 1 and 0.1.
    cos_PC, sin_PC = rotary_tables([(1, 2)], 8, 100.0, dtype=torch.float64, device=CPU)
    heads_PHC = torch.arange(1.0, 9.0, dtype=torch.float64).expand(2, 3, 8)
    turned_C = rotate(heads_PHC, cos_PC, sin_PC)[1, 2]
    c1, s1, c2, s2 = math.cos(1), math.sin(1), math.cos(0.1), math.sin(0.1)
    expected = [1, 2, 3 * c1 - 7 * s1, 4 * c2 - 8 * s2, 5, 6, 7 * c1 + 3 * s1, 8 * c2 + 4 * s2]
    assert_close(turned_C, torch.tensor(expected, dtype=torch.float64), 1e-14)


def test_products_depend_on_offsets_only() -> None:
    patch_grid = (7, 9)
    cos_PC, sin_PC = rotary_tables([patch_grid], 72, 1e4, dtype=torch.float64, device=CPU)
    q_PHC = rotate(make_tensor(1, 1, 72, seed=1).expand(63, 1, 72), cos_PC, sin_PC)
    k_PHC = rotate(make_tensor(1, 1, 72, seed=2).expand(63, 1, 72), cos_PC, sin_PC)

    def product(row: int, column: int, row_step: int, column_step: int) -> torch.Tensor:
        query = row * patch_grid[1] + column
        key = (row + row_step) * patch_grid[1] + column + column_step
        return (q_PHC[query] * k_PHC[key]).sum()

    assert_close(product(0, 0, 2, 3), product(4, 5, 2, 3), 1e-12)
    assert abs(product(0, 0, 2, 3) - product(0, 0, 3, 2)) > 1e-3, "rows are not columns"


def test_type_of_the_input_is_kept() -> None:
    cos_PC, sin_PC = rotary_tables([(1, 2)], 8, 1e4, dtype=torch.float32, device=CPU)
    heads_PHC = make_tensor(2, 3, 8, seed=3, dtype=torch.bfloat16)
    assert rotate(heads_PHC, cos_PC, sin_PC).dtype == torch.bfloat16, "type"
    cos_PC, _ = rotary_tables([], 8, 1e4, dtype=torch.float32, device=CPU)
    assert cos_PC.shape == (0, 8), "no frame"
