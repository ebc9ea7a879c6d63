"""The tensors of a Hugging Face checkpoint as views of one process's weights.

A view works both ways and for anything of a weight's shape: loading writes through it, and a
gradient read through it has the checkpoint's name and shape.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_keye.config import DecoderConfig

ExpertLayout = Literal["fused", "per-expert"]
"""One tensor [E, in, out] for all experts of a layer, or tensors [out, in] for each."""

Weights = Mapping[str, Tensor]
"""Tensors by the name of their parameter in the decoder chunk or the vision tower."""

_VISION_PREFIXES = {"encoder.": "visual.vision_model.", "projector.": "mlp_AR."}
_DECODER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "block.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER_NAMES = {
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


@dataclass(frozen=True)
class HfView:
    """One tensor of the checkpoint."""

    parts: tuple[Tensor, ...]
    """Views that the tensor is cut into along its first dimension, one for each expert, or the
    whole tensor alone. They may have more dimensions than the tensor."""
    shape: tuple[int, ...]
    """Shape in the checkpoint."""

    def read(self) -> Tensor:
        """Return a copy in the checkpoint's shape."""
        return torch.stack(self.parts).reshape(self.shape)

    @torch.no_grad()
    def write(self, tensor: Tensor) -> None:
        """Copy `tensor`, of the checkpoint's shape, into the weights, in their type."""
        pieces = tensor.reshape(len(self.parts), *self.parts[0].shape)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.copy_(piece)


def vision_views(weights: Weights) -> Iterator[tuple[str, HfView]]:
    """Yield name and view of every tensor of the ViT and the projector."""
    for name, weight in weights.items():
        prefix = next(prefix for prefix in _VISION_PREFIXES if name.startswith(prefix))
        hf_name = _VISION_PREFIXES[prefix] + name.removeprefix(prefix)
        yield hf_name, _whole(weight)


def decoder_views(
    weights: Weights, decoder: DecoderConfig, layout: ExpertLayout
) -> Iterator[tuple[str, HfView]]:
    """Yield name and view of every tensor of a decoder that stands in one chunk.

    Args:
        weights: All weights of the chunk, or their gradients.
        decoder: Sizes.
        layout: How the checkpoint holds experts.
    """
    for name, hf_name in _DECODER_NAMES.items():
        yield hf_name, _whole(weights[name])
    for layer in range(decoder.num_layers):
        prefix, hf_prefix = f"block.layers.{layer}.", f"model.layers.{layer}."
        for name, hf_name in _LAYER_NAMES.items():
            yield hf_prefix + hf_name, _whole(weights[prefix + name])
        mixed = weights[f"{prefix}self_attention.linear_qkv.weight"]
        for kind, view in _attention_views(mixed, decoder):
            yield f"{hf_prefix}self_attn.{kind}_proj.weight", view
        experts = [
            tuple(
                weights[f"{prefix}mlp.experts.local_experts.{expert}.linear_{half}.weight"]
                for half in ("fc1", "fc2")
            )
            for expert in range(decoder.experts.num_experts)
        ]
        for name, view in _EXPERT_VIEWS[layout](experts):
            yield f"{hf_prefix}mlp.experts.{name}", view


def _whole(weight: Tensor) -> HfView:
    return HfView((weight,), tuple(weight.shape))


def _attention_views(mixed: Tensor, decoder: DecoderConfig) -> Iterator[tuple[str, HfView]]:
    """Split [its query heads, key, value] of every key-value group into the three projections."""
    heads, groups = decoder.num_heads // decoder.num_kv_heads, decoder.num_kv_heads
    mixed_GHCD = mixed.view(groups, heads + 2, decoder.head_dim, -1)
    for kind, start, size in (("q", 0, heads), ("k", heads, 1), ("v", heads + 1, 1)):
        part_GHCD = mixed_GHCD[:, start : start + size]
        rows = groups * size * decoder.head_dim
        yield kind, HfView((part_GHCD,), (rows, mixed.shape[1]))


def _fused_experts(experts: list[tuple[Tensor, ...]]) -> Iterator[tuple[str, HfView]]:
    """View experts [gate then up, D], [D, F] as [E, D, gate then up], [E, F, D]."""
    for name, half in (("gate_up_proj", 0), ("down_proj", 1)):
        parts = tuple(expert[half].T for expert in experts)
        yield name, HfView(parts, (len(parts), *parts[0].shape))


def _separate_experts(experts: list[tuple[Tensor, ...]]) -> Iterator[tuple[str, HfView]]:
    for number, (gate_up, down) in enumerate(experts):
        gate, up = gate_up.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            yield f"{number}.{name}.weight", _whole(weight)


_EXPERT_VIEWS: dict[ExpertLayout, Callable[..., Iterator[tuple[str, HfView]]]] = {
    "fused": _fused_experts,
    "per-expert": _separate_experts,
}
