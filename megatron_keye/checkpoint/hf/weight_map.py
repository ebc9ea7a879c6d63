# SPDX-License-Identifier: Apache-2.0
"""The mapping between tensors of the released checkpoint and native ones: one table, both ways.

Native is what training saves: Megatron-Core's names, layers and experts stacked along leading
axes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_keye.checkpoint.hf.arrangement import (
    Arrangement,
    GateAndUp,
    Grouped,
    Same,
    Transposed,
)
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.config.model import DecoderConfig, ModelConfig

_LAYER = "decoder.block.layers."
_UNSTACKED = {
    "decoder.embedding.weight": "model.embed_tokens.weight",
    "decoder.block.final_layernorm.weight": "model.norm.weight",
    "decoder.output_layer.weight": "lm_head.weight",
}
_PER_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.indexer.q_proj.weight": "self_attn.sa_indexer.q_proj.weight",
    "self_attention.indexer.k_proj.weight": "self_attn.sa_indexer.k_proj.weight",
    "self_attention.indexer.q_norm.weight": "self_attn.sa_indexer.q_norm.weight",
    "self_attention.indexer.k_norm.weight": "self_attn.sa_indexer.k_norm.weight",
    "self_attention.indexer.k_norm.bias": "self_attn.sa_indexer.k_norm.bias",
    "mlp.router.weight": "mlp.gate.weight",
}
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.experts.experts.linear_fc1.weight"
_FC2 = "mlp.experts.experts.linear_fc2.weight"
_VISION = {"visual.vision_model.": "vision.encoder.", "mlp_AR.": "vision.projector."}


@dataclass(frozen=True)
class HfPart:
    """A tensor of the released checkpoint, or one expert's slice of it."""

    name: str
    """Its name."""
    index: int | None = None
    """Index along its first dimension; None for the whole tensor."""


@dataclass(frozen=True)
class WeightMapping:
    """One native weight of one layer (and expert) and its parts in the released checkpoint."""

    key: str
    """Native name, equal for all layers and experts."""
    stacked_index: tuple[int, ...]
    """Index along the stacked axes: (), (layer,) or (layer, expert)."""
    stacked_shape: tuple[int, ...]
    """Sizes of the stacked axes."""
    parts: tuple[HfPart, ...]
    """Its parts, in the order that `arrangement` expects."""
    arrangement: Arrangement
    """How the parts form the weight."""


def weight_mappings(model: ModelConfig, layout: ExpertLayout) -> Iterator[WeightMapping]:
    """Yield the mappings of the whole model, each tensor exactly once.

    Args:
        model: Sizes.
        layout: Expert layout of the released checkpoint.
    """
    for name in parameter_shapes(model, layout):
        for prefix, native in _VISION.items():
            if name.startswith(prefix):
                key = native + name.removeprefix(prefix)
                yield WeightMapping(key, (), (), (HfPart(name),), Same())
    for key, name in _UNSTACKED.items():
        yield WeightMapping(key, (), (), (HfPart(name),), Same())
    for layer in range(model.decoder.num_layers):
        yield from _layer_mappings(layer, model.decoder)
        for expert in range(model.decoder.experts.num_experts):
            yield from _expert_mappings(layer, expert, model.decoder, layout)


def _layer_mappings(layer: int, decoder: DecoderConfig) -> Iterator[WeightMapping]:
    stacked = (layer,), (decoder.num_layers,)
    prefix = f"model.layers.{layer}."
    for key, name in _PER_LAYER.items():
        yield WeightMapping(_LAYER + key, *stacked, (HfPart(prefix + name),), Same())
    attention = tuple(HfPart(f"{prefix}self_attn.{kind}_proj.weight") for kind in "qkv")
    grouped = Grouped(decoder.num_heads, decoder.num_kv_heads)
    yield WeightMapping(_LAYER + _QKV, *stacked, attention, grouped)


def _expert_mappings(
    layer: int, expert: int, decoder: DecoderConfig, layout: ExpertLayout
) -> Iterator[WeightMapping]:
    stacked = (layer, expert), (decoder.num_layers, decoder.experts.num_experts)
    prefix = f"model.layers.{layer}.mlp.experts."
    if layout == "fused":
        gate_up = (HfPart(f"{prefix}gate_up_proj", expert),)
        down = HfPart(f"{prefix}down_proj", expert)
        yield WeightMapping(_LAYER + _FC1, *stacked, gate_up, Transposed(2))
        yield WeightMapping(_LAYER + _FC2, *stacked, (down,), Transposed(1))
        return
    both = tuple(HfPart(f"{prefix}{expert}.{kind}_proj.weight") for kind in ("gate", "up"))
    yield WeightMapping(_LAYER + _FC1, *stacked, both, GateAndUp())
    down = HfPart(f"{prefix}{expert}.down_proj.weight")
    yield WeightMapping(_LAYER + _FC2, *stacked, (down,), Same())
