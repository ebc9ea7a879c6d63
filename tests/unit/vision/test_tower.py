# SPDX-License-Identifier: Apache-2.0
"""Tests of the whole vision side: sizes, initialisation, and frames through both halves."""

import torch

from megatron_keye.config import VisionConfig
from megatron_keye.vision import VisionTower
from tests.support.numerics import assert_close, make_tensor

SMALL = VisionConfig(
    num_layers=1,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    image_size=20,
    num_packing_positions=6,
)
RELEASED = VisionConfig(
    num_layers=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    num_packing_positions=32_768,
)


def test_released_sizes_give_the_released_parameter_counts() -> None:
    with torch.device("meta"):
        tower = VisionTower(RELEASED, decoder_hidden_size=2048)
    assert sum(p.numel() for p in tower.encoder.parameters()) == 450_735_984, "encoder"
    assert sum(p.numel() for p in tower.projector.parameters()) == 30_686_720, "projector"


def test_one_token_stands_for_four_patches_of_its_own_frame() -> None:
    tower = VisionTower(SMALL, decoder_hidden_size=10).double()
    tower.reset_parameters(seed=1)
    patch_grids = [(4, 6), (2, 2)]
    patches_PCXX = make_tensor(28, 3, 4, 4, seed=2)
    merged_MD = tower(patches_PCXX, patch_grids)
    assert merged_MD.shape == (7, 10), "6 + 1 tokens"
    assert_close(merged_MD[6:], tower(patches_PCXX[24:], [(2, 2)]), 1e-12)


def test_no_frame_gives_zero_gradients() -> None:
    tower = VisionTower(SMALL, decoder_hidden_size=10)
    tower.reset_parameters(seed=1)
    merged_MD = tower(torch.empty(0, 3, 4, 4), [])
    assert merged_MD.shape == (0, 10), "no token"
    merged_MD.sum().backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), f"gradient of {name}"


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, second, other = (VisionTower(SMALL, decoder_hidden_size=10) for _ in range(3))
    first.reset_parameters(seed=1)
    torch.rand(7)
    second.bfloat16().reset_parameters(seed=1)
    other.reset_parameters(seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.bfloat16(), second.get_parameter(name)), f"{name} by seed"
        if parameter.dim() > 1:
            assert not torch.equal(parameter, other.get_parameter(name)), f"{name} of seed 2"


def test_initial_values() -> None:
    tower = VisionTower(SMALL, decoder_hidden_size=10)
    tower.reset_parameters(seed=1)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), f"{name} is 0"
        elif "norm" in name:
            assert (parameter == 1).all(), f"{name} is 1"
        else:
            assert 0.014 < parameter.std() < 0.026, f"{name} has deviation 0.02"


def test_bfloat16_runs_close_to_float64() -> None:
    tower = VisionTower(SMALL, decoder_hidden_size=10).bfloat16()
    tower.reset_parameters(seed=1)
    exact = VisionTower(SMALL, decoder_hidden_size=10).double()
    exact.load_state_dict(tower.state_dict())
    patches_PCXX = make_tensor(24, 3, 4, 4, seed=3, dtype=torch.bfloat16)
    merged_MD = tower(patches_PCXX, [(4, 6)])
    assert merged_MD.dtype == torch.bfloat16, "type"
    assert_close(merged_MD, exact(patches_PCXX.double(), [(4, 6)]), 2e-2)
