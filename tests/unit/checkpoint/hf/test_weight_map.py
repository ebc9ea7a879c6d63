# SPDX-License-Identifier: Apache-2.0
"""The table uses every element exactly once, on both sides, and moves it to the right place."""

from math import prod

import pytest
import torch

from megatron_keye.checkpoint.convert.to_native import native_shapes
from megatron_keye.checkpoint.hf.arrangement import GateAndUp, Grouped, Same, Transposed
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.checkpoint.hf.weight_map import weight_mappings
from tests.support.tiny import tiny_model

LAYOUTS: tuple[ExpertLayout, ...] = ("fused", "per-expert")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_released_element_is_used_once(layout: ExpertLayout) -> None:
    shapes = parameter_shapes(tiny_model(), layout)
    used = dict.fromkeys(shapes, 0)
    parts = [part for mapping in weight_mappings(tiny_model(), layout) for part in mapping.parts]
    assert len(parts) == len(set(parts)), "a part is used twice"
    for part in parts:
        used[part.name] += prod(shapes[part.name][0 if part.index is None else 1 :])
    assert used == {name: prod(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_native_element_is_made_once(layout: ExpertLayout) -> None:
    made = [
        (mapping.key, mapping.stacked_index) for mapping in weight_mappings(tiny_model(), layout)
    ]
    assert len(made) == len(set(made)), "a weight is made twice"
    total = sum(prod(shape) for shape in native_shapes(tiny_model()).values())
    assert total == sum(prod(shape) for shape in parameter_shapes(tiny_model()).values())


def test_each_group_has_its_query_heads_then_key_then_value() -> None:
    arrangement = Grouped(num_heads=4, num_kv_heads=2)
    q, k, v = torch.arange(8), torch.arange(10, 14), torch.arange(20, 24)
    parts = [part[:, None].expand(-1, 3) for part in (q, k, v)]
    (joined,) = arrangement.join(parts)
    assert joined[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    for got, expected in zip(arrangement.split(joined), parts, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("arrangement", [Same(), GateAndUp(), Transposed(1), Transposed(2)])
def test_splitting_inverts_joining(arrangement: Same | GateAndUp | Transposed) -> None:
    num_parts = 2 if isinstance(arrangement, GateAndUp) else 1
    parts = [torch.randn(258, 130) for _ in range(num_parts)]
    joined = torch.cat(arrangement.join(parts))
    for got, expected in zip(arrangement.split(joined), parts, strict=True):
        assert torch.equal(got, expected)


def test_gate_is_the_first_half_of_the_fused_columns() -> None:
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    fused_DF = torch.cat([gate.T, up.T], dim=1)
    blocks = Transposed(2).join([fused_DF])
    assert torch.equal(blocks[0], gate) and torch.equal(blocks[1], up)
