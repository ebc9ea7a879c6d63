# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of all tensors of the released checkpoint, computed from the sizes alone.

Standard library only, so that a plan or a check of headers needs no torch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal

from megatron_keye.config.model import DecoderConfig, ModelConfig, VisionConfig
from megatron_keye.config.parts import PARTS, Part

ExpertLayout = Literal["fused", "per-expert"]
"""One tensor [E, in, out] for all experts of a layer, or tensors [out, in] for each."""
Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
"""In the released checkpoint but unused; absent with 0 rows."""


def parameter_shapes(model: ModelConfig, layout: ExpertLayout = "fused") -> dict[str, Shape]:
    """Return the shape of every tensor by its name, in the order of the model.

    Args:
        model: Sizes.
        layout: Expert layout.
    """
    shapes = dict(_vision(model.vision))
    shapes |= dict(_projector(model.vision, model.decoder.hidden_size))
    shapes |= dict(_decoder(model.decoder, layout))
    return shapes


def count_parameters(shapes: Mapping[str, Shape]) -> dict[Part, int]:
    """Return the number of parameters of each part."""
    counts: Counter[Part] = Counter(dict.fromkeys(PARTS, 0))
    for name, shape in shapes.items():
        counts[part_of(name)] += prod(shape)
    return dict(counts)


def part_of(name: str) -> Part:
    """Return which part of the model a tensor belongs to."""
    if name.startswith("visual."):
        return "vision"
    if name.startswith("mlp_AR."):
        return "projector"
    return "indexer" if ".sa_indexer." in name else "decoder"


def layout_of(names: Mapping[str, object]) -> ExpertLayout:
    """Return the expert layout that a checkpoint with these `names` has."""
    is_fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    return "fused" if is_fused else "per-expert"


def _with_bias(name: str, *weight: int) -> Named:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _vision(vision: VisionConfig) -> Named:
    width, hidden = vision.hidden_size, vision.intermediate_size
    top = "visual.vision_model."
    yield from _with_bias(
        f"{top}embeddings.patch_embedding", width, 3, vision.patch_size, vision.patch_size
    )
    side = vision.image_size // vision.patch_size
    yield f"{top}embeddings.position_embedding.weight", (side * side, width)
    if vision.num_packing_positions:
        yield PACKING_TABLE, (vision.num_packing_positions, width)
    for layer in range(vision.num_layers):
        prefix = f"{top}encoder.layers.{layer}."
        yield from _with_bias(f"{prefix}layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{prefix}self_attn.{projection}", width, width)
        yield from _with_bias(f"{prefix}layer_norm2", width)
        yield from _with_bias(f"{prefix}mlp.fc1", hidden, width)
        yield from _with_bias(f"{prefix}mlp.fc2", width, hidden)
    yield from _with_bias(f"{top}post_layernorm", width)


def _projector(vision: VisionConfig, decoder_width: int) -> Named:
    merged = vision.hidden_size * vision.merge_size**2
    yield from _with_bias("mlp_AR.pre_norm", merged)
    yield from _with_bias("mlp_AR.linear_1", merged, merged)
    yield from _with_bias("mlp_AR.linear_2", decoder_width, merged)


def _decoder(decoder: DecoderConfig, layout: ExpertLayout) -> Named:
    width = decoder.hidden_size
    yield "model.embed_tokens.weight", (decoder.vocab_size, width)
    for layer in range(decoder.num_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (width,)
        yield from _attention(f"{prefix}self_attn.", decoder)
        yield from _indexer(f"{prefix}self_attn.sa_indexer.", decoder)
        yield f"{prefix}post_attention_layernorm.weight", (width,)
        yield f"{prefix}mlp.gate.weight", (decoder.experts.num_experts, width)
        yield from _experts(f"{prefix}mlp.experts.", decoder, layout)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (decoder.vocab_size, width)


def _attention(prefix: str, decoder: DecoderConfig) -> Named:
    width, head = decoder.hidden_size, decoder.head_dim
    queries, keys = decoder.num_heads * head, decoder.num_kv_heads * head
    yield f"{prefix}q_proj.weight", (queries, width)
    yield f"{prefix}k_proj.weight", (keys, width)
    yield f"{prefix}v_proj.weight", (keys, width)
    yield f"{prefix}o_proj.weight", (width, queries)
    yield f"{prefix}q_norm.weight", (head,)
    yield f"{prefix}k_norm.weight", (head,)


def _indexer(prefix: str, decoder: DecoderConfig) -> Named:
    heads, head = decoder.indexer.num_heads, decoder.indexer.head_dim
    # The last rows of q_proj are the gates, one per head.
    yield f"{prefix}q_proj.weight", (heads * head + heads, decoder.hidden_size)
    yield f"{prefix}k_proj.weight", (head, decoder.hidden_size)
    yield f"{prefix}q_norm.weight", (head,)
    yield from _with_bias(f"{prefix}k_norm", head)


def _experts(prefix: str, decoder: DecoderConfig, layout: ExpertLayout) -> Named:
    width, hidden = decoder.hidden_size, decoder.experts.intermediate_size
    num_experts = decoder.experts.num_experts
    if layout == "fused":
        yield f"{prefix}gate_up_proj", (num_experts, width, 2 * hidden)
        yield f"{prefix}down_proj", (num_experts, hidden, width)
        return
    for expert in range(num_experts):
        yield f"{prefix}{expert}.gate_proj.weight", (hidden, width)
        yield f"{prefix}{expert}.up_proj.weight", (hidden, width)
        yield f"{prefix}{expert}.down_proj.weight", (width, hidden)
