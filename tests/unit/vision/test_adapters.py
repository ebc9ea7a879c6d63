# SPDX-License-Identifier: Apache-2.0
"""Adapters of ViT and projector leave the other parameters alone, and begin as 0."""

import torch

from megatron_keye.config import VisionConfig
from megatron_keye.config.lora import LoraConfig
from megatron_keye.vision import VisionTower, add_adapters
from tests.support.numerics import make_tensor

SMALL = VisionConfig(
    num_layers=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, image_size=20
)


def tower(lora: LoraConfig) -> VisionTower:
    made = VisionTower(SMALL, decoder_hidden_size=10)
    made.reset_parameters(seed=1)
    add_adapters(made, lora, seed=1)
    return made


def test_only_the_linears_of_a_target_have_adapters() -> None:
    plain, adapted = tower(LoraConfig()), tower(LoraConfig(rank=2, targets=("projector",)))
    added = adapted.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"projector.linear_{n}.lora_{kind}" for n in (1, 2) for kind in "ab"}
    held = adapted.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in plain.state_dict().items())


def test_new_adapters_change_nothing_and_no_frame_gives_zero_gradients() -> None:
    plain, adapted = tower(LoraConfig()), tower(LoraConfig(rank=2, targets=("vision",)))
    patches_PCXX = make_tensor(8, 3, 4, 4, seed=2, dtype=torch.float32)
    assert torch.equal(plain(patches_PCXX, [(2, 4)]), adapted(patches_PCXX, [(2, 4)]))
    adapted(patches_PCXX[:0], []).sum().backward()
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
