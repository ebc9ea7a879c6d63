# SPDX-License-Identifier: Apache-2.0
"""Settings of adapters: what they mean, and what is refused."""

import pytest

from megatron_keye.checkpoint.convert.to_native import native_shapes
from megatron_keye.config.lora import LoraConfig, is_adapter
from megatron_keye.config.parts import Part
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_model, tiny_run

ON = "training.lora.rank=4"


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ((), ("decoder", "indexer")),
        (("training.lora.targets=attention,vision",), ("vision", "decoder", "indexer")),
        (("training.lora.targets=projector",), ("projector", "indexer")),
        (("training.phase=dense",), ("decoder",)),
        (("training.frozen=indexer,vision",), ("decoder",)),
    ],
)
def test_adapters_and_indexers_alone_learn(
    settings: tuple[str, ...], trained: tuple[Part, ...]
) -> None:
    training = tiny_run().with_overrides([ON, *settings]).training
    assert training.trained_parts == trained
    for part in ("vision", "projector", "decoder", "indexer"):
        assert training.is_trained(part, is_adapter=True) == (part in trained)
        is_indexer = part == "indexer" and part in trained
        assert training.is_trained(part, is_adapter=False) == is_indexer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("training.lora.rank=-1",), "training.lora.rank: got -1, expected 0 or more"),
        ((ON, "training.lora.alpha=0"), "training.lora.alpha: got 0.0, expected a number above 0"),
        ((ON, "training.lora.targets=q_proj"), "training.lora.targets: got 'q_proj', expected"),
        ((ON, "training.lora.targets=[]"), "training.lora.targets: got (), expected targets"),
        (("training.lora.targets=vision",), "expected ('attention',) while training.lora.rank is"),
        (("training.lora.alpha=3",), "expected 32.0 while training.lora.rank is 0"),
        ((ON, "training.phase=indexer_warmup"), "training.lora.rank: got 4, expected 0 with"),
        ((ON, "training.frozen=decoder"), "none of ['attention'], whose linears are in a part"),
    ],
)
def test_adapters_that_could_not_learn_are_refused(
    settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        tiny_run().with_overrides(list(settings))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_targets_stand_for_all_linears_but_router_indexer_and_output_layer() -> None:
    weights = native_shapes(tiny_model())
    lora = LoraConfig(rank=3, targets=("attention", "experts", "projector", "vision"))
    shapes = lora.adapter_shapes(weights)
    adapted = {name.removesuffix("lora_a") for name in shapes if name.endswith("lora_a")}
    others = [
        name
        for name, shape in weights.items()
        if name.removesuffix("weight") not in adapted
        and len(shape) - name.startswith("decoder.block.layers.") > 1
    ]
    expected = ("router", "indexer", "embedding", "output_layer")
    assert others and all(any(word in name for word in expected) for name in others), others
    layers = "decoder.block.layers."
    assert shapes[f"{layers}self_attention.linear_qkv.lora_b"] == (4, 4 * (2 + 2) * 16, 3)
    assert shapes[f"{layers}mlp.experts.experts.linear_fc2.lora_a"] == (4, 4, 3, 24)
    assert all(map(is_adapter, shapes)) and not any(map(is_adapter, weights))


def test_without_adapters_there_are_no_shapes() -> None:
    assert not LoraConfig().adapter_shapes(native_shapes(tiny_model()))
