# SPDX-License-Identifier: Apache-2.0
"""Tests of the projector and its merge of neighbouring patches."""

import pytest
import torch
from torch.nn import functional

from megatron_keye.config import VisionConfig
from megatron_keye.vision import Projector
from megatron_keye.vision.projector import merge_neighbours
from tests.support.numerics import assert_close, make_tensor

CONFIG = VisionConfig(num_layers=1, hidden_size=8, intermediate_size=8, num_heads=1)


def test_merge_order_of_a_hand_case() -> None:
    # A frame of 2 x 4 patches, numbered in raster order, then one of 4 x 2.
    features_PW = torch.arange(16.0)[:, None]
    merged = merge_neighbours(features_PW, [(2, 4), (4, 2)], 2)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert merged.tolist() == expected, "row first, then column; cells in raster order"


def test_merge_keeps_the_channels_of_a_patch_together() -> None:
    features_PW = torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
    merged = merge_neighbours(features_PW, [(2, 2)], 2)
    assert merged.tolist() == [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]], "patch by patch"


def test_projection_equals_its_formula_cell_by_cell() -> None:
    projector = Projector(CONFIG, decoder_hidden_size=5).double()
    for seed, parameter in enumerate(projector.parameters()):
        parameter.data.copy_(make_tensor(*parameter.shape, seed=seed))
    features_PW = make_tensor(4 * 6, 8, seed=20)
    merged_MD = projector(features_PW, [(4, 6)])
    for row in range(2):
        for column in range(3):
            patches = [(2 * row + i) * 6 + 2 * column + j for i in (0, 1) for j in (0, 1)]
            cell = features_PW[patches].flatten()
            centred = cell - cell.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt()
            normed = normed * projector.pre_norm.weight + projector.pre_norm.bias
            hidden = projector.linear_1.weight @ normed + projector.linear_1.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            expected = functional.linear(
                hidden, projector.linear_2.weight, projector.linear_2.bias
            )
            assert_close(merged_MD[3 * row + column], expected, 1e-11)


def test_names_are_those_of_the_released_checkpoint() -> None:
    shapes = {name: tuple(p.shape) for name, p in Projector(CONFIG, 5).named_parameters()}
    assert shapes == {
        "pre_norm.weight": (32,),
        "pre_norm.bias": (32,),
        "linear_1.weight": (32, 32),
        "linear_1.bias": (32,),
        "linear_2.weight": (5, 32),
        "linear_2.bias": (5,),
    }, "names and shapes"


def test_an_odd_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_grid of frame 0: got 3 x 2 .* multiples of 2"):
        Projector(CONFIG, 5)(make_tensor(6, 8, seed=1), [(3, 2)])
