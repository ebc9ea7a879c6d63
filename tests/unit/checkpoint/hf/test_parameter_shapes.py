# SPDX-License-Identifier: Apache-2.0
"""The names and shapes computed from the sizes alone are the released checkpoint's."""

from math import prod

import pytest

from megatron_keye.checkpoint.hf.parameter_shapes import (
    ExpertLayout,
    count_parameters,
    layout_of,
    parameter_shapes,
)
from megatron_keye.recipes import load_recipe

MODEL = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True).model


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_the_full_size_model_has_the_released_counts(layout: ExpertLayout) -> None:
    shapes = parameter_shapes(MODEL, layout)
    assert count_parameters(shapes) == {
        "decoder": 30_532_122_624,
        "vision": 450_735_984,
        "projector": 30_686_720,
        "indexer": 108_536_832,
    }
    assert sum(map(prod, shapes.values())) == 31_122_082_160


def test_an_indexer_has_the_released_size() -> None:
    shapes = parameter_shapes(MODEL)
    of_layer = [
        prod(s) for n, s in shapes.items() if n.startswith("model.layers.47.self_attn.sa_")
    ]
    assert sum(of_layer) == 2_261_184


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual.vision_model.embeddings.patch_embedding.weight", (1152, 3, 14, 14)),
        ("visual.vision_model.embeddings.position_embedding.weight", (729, 1152)),
        ("visual.vision_model.embeddings.packing_position_embedding.weight", (32_768, 1152)),
        ("visual.vision_model.encoder.layers.26.mlp.fc1.bias", (4304,)),
        ("mlp_AR.linear_2.weight", (2048, 4608)),
        ("model.layers.0.self_attn.q_proj.weight", (4096, 2048)),
        ("model.layers.47.self_attn.sa_indexer.q_proj.weight", (1040, 2048)),
        ("model.layers.47.mlp.experts.gate_up_proj", (128, 2048, 1536)),
        ("model.layers.47.mlp.experts.down_proj", (128, 768, 2048)),
        ("lm_head.weight", (151_936, 2048)),
    ],
)
def test_names_and_shapes_are_the_released_ones(name: str, shape: tuple[int, ...]) -> None:
    assert parameter_shapes(MODEL)[name] == shape


def test_the_base_models_layout_has_one_matrix_per_expert() -> None:
    shapes = parameter_shapes(MODEL, "per-expert")
    assert shapes["model.layers.3.mlp.experts.127.gate_proj.weight"] == (768, 2048)
    assert shapes["model.layers.3.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert layout_of(shapes) == "per-expert"
    assert layout_of(parameter_shapes(MODEL)) == "fused"
