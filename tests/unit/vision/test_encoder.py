# SPDX-License-Identifier: Apache-2.0
"""Tests of the vision transformer, against transformers' SigLIP where the two coincide."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_keye.config import VisionConfig
from megatron_keye.vision import VisionEncoder, VisionTower, encoder
from megatron_keye.vision.patch_grids import PatchGrid
from tests.support.numerics import assert_close, make_tensor

CONFIG = VisionConfig(
    num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, image_size=20
)


def make_encoder(
    config: VisionConfig = CONFIG, dtype: torch.dtype = torch.float64
) -> VisionEncoder:
    """Return an encoder with random weights, large enough that every part matters."""
    tower = VisionTower(config, decoder_hidden_size=8).to(dtype)
    tower.reset_parameters(seed=1)
    for seed, parameter in enumerate(tower.encoder.parameters()):
        noise = make_tensor(*parameter.shape, seed=seed, dtype=dtype)
        parameter.data.add_(noise, alpha=0.1)
    return tower.encoder


def make_patches(patch_grids: Sequence[PatchGrid], seed: int) -> Tensor:
    """Return random patches of all frames."""
    return make_tensor(sum(height * width for height, width in patch_grids), 3, 4, 4, seed=seed)


def without_rotation(
    patch_grids: Sequence[PatchGrid], head_dim: int, theta: float, **kwargs: Any
) -> Any:
    """Return the tables of angle 0 for every patch."""
    num_patches = sum(height * width for height, width in patch_grids)
    cos_PC = torch.ones(num_patches, head_dim, **kwargs)
    return cos_PC, torch.zeros_like(cos_PC)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_siglip_without_rotation(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "rotary_tables", without_rotation)
    ours = make_encoder(dtype=dtype).eval()
    siglip_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=20,
        patch_size=4,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    siglip: nn.Module = SiglipVisionModel(siglip_config)
    siglip.to(dtype).eval()
    siglip.load_state_dict(ours.state_dict())
    pixels = make_tensor(3, 3, 20, 20, seed=2, dtype=dtype)
    patches_PCXX = (
        pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
    )
    features_PW = ours(patches_PCXX, [(5, 5)] * 3)
    assert_close(features_PW, siglip(pixels).last_hidden_state.flatten(0, 1), tolerance)


def test_rotation_changes_the_result() -> None:
    patches_PCXX = make_patches([(4, 6)], seed=3)
    ours = make_encoder()
    features_PW = ours(patches_PCXX, [(4, 6)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "rotary_tables", without_rotation)
        unturned_PW = ours(patches_PCXX, [(4, 6)])
    assert (features_PW - unturned_PW).abs().max() > 1e-3, "rotation is applied"


def test_packing_equals_one_frame_at_a_time() -> None:
    patch_grids = [(4, 6), (4, 6), (6, 4), (2, 2), (4, 6)]
    patches_PCXX = make_patches(patch_grids, seed=4)
    ours = make_encoder()
    sizes = [height * width for height, width in patch_grids]
    alone = [
        ours(part, [patch_grid])
        for part, patch_grid in zip(patches_PCXX.split(sizes), patch_grids, strict=True)
    ]
    assert_close(ours(patches_PCXX, patch_grids), torch.cat(alone), 1e-12)


def test_frames_do_not_see_each_other() -> None:
    patch_grids = [(4, 6), (4, 6), (2, 2)]
    patches_PCXX = make_patches(patch_grids, seed=5).requires_grad_()
    features_PW = make_encoder()(patches_PCXX, patch_grids)
    (gradient,) = torch.autograd.grad(features_PW[24:48].square().sum(), patches_PCXX)
    assert gradient[24:48].any(), "its own frame"
    assert not gradient[:24].any() and not gradient[48:].any(), "other frames"


def test_every_patch_of_a_frame_sees_all_of_it() -> None:
    patches_PCXX = make_patches([(4, 6)], seed=6).requires_grad_()
    features_PW = make_encoder()(patches_PCXX, [(4, 6)])
    (gradient,) = torch.autograd.grad(features_PW[0].sum(), patches_PCXX)
    assert gradient.flatten(1).any(1).all(), "bidirectional"


def test_no_frame_gives_zero_gradients() -> None:
    ours = make_encoder()
    features_PW = ours(make_patches([], seed=7), [])
    assert features_PW.shape == (0, 32), "no feature"
    features_PW.sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), f"gradient of {name}"


def test_packing_table_is_carried_but_never_trained() -> None:
    config = VisionConfig(
        num_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=4,
        image_size=20,
        num_packing_positions=10,
    )
    ours = make_encoder(config)
    table = ours.get_parameter("embeddings.packing_position_embedding.weight")
    assert table.shape == (10, 32) and not table.requires_grad, "frozen table"
    patches_PCXX = make_patches([(2, 2)], seed=8)
    before_PW = ours(patches_PCXX, [(2, 2)])
    table.data.fill_(torch.nan)
    assert torch.equal(ours(patches_PCXX, [(2, 2)]), before_PW), "never read"
    assert "embeddings.packing_position_embedding.weight" not in make_encoder().state_dict(), (
        "none"
    )


def test_names_are_those_of_the_released_checkpoint() -> None:
    layer = "encoder.layers.1."
    expected = {
        "embeddings.patch_embedding.weight": (32, 3, 4, 4),
        "embeddings.position_embedding.weight": (25, 32),
        layer + "layer_norm2.bias": (32,),
        layer + "self_attn.q_proj.weight": (32, 32),
        layer + "self_attn.out_proj.bias": (32,),
        layer + "mlp.fc1.weight": (48, 32),
        layer + "mlp.fc2.weight": (32, 48),
        "post_layernorm.weight": (32,),
    }
    state = make_encoder().state_dict()
    for name, shape in expected.items():
        assert state[name].shape == shape, name
    assert len(state) == 3 + 2 * 16 + 2, "nothing else"


def test_a_misfit_is_named() -> None:
    ours = make_encoder()
    with pytest.raises(ValueError, match="patches_PCXX: got 4 patches, expected 10"):
        ours(make_patches([(2, 2)], seed=9), [(2, 2), (2, 3)])
    with pytest.raises(ValueError, match=r"expected \[P, 3, 4, 4\]"):
        ours(make_tensor(4, 3, 14, 14, seed=9), [(2, 2)])
    with pytest.raises(ValueError, match="patch_grid of frame 1: got 0 x 3"):
        ours(make_patches([(2, 2)], seed=9), [(2, 2), (0, 3)])
