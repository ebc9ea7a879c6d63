# SPDX-License-Identifier: Apache-2.0
"""Counts the parameters on each rank, by part of the model and by whether experts own them.

Counted from the released checkpoint's names and shapes, adapters from the sizes of their linears.
Needs no torch.
"""

import functools
from collections import Counter
from math import prod

from megatron_keye.checkpoint.hf.parameter_shapes import (
    count_parameters,
    parameter_shapes,
    part_of,
)
from megatron_keye.config.lora import TARGETS, Target
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parts import Part
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.state import Parameters

_EXPERTS = ".mlp.experts."
# Split over the tensor axis; norms, router and indexer are replicated along it.
_SPLIT_BY_TENSOR = ("q_proj", "k_proj", "v_proj", "o_proj")


def stage_layers(run: RunConfig, stage: int) -> list[int]:
    """Return the 0-based decoder layers of a pipeline stage, by virtual stage."""
    degrees, num_layers = run.parallel.decoder, run.model.decoder.num_layers
    return [
        layer
        for index in range(degrees.virtual_stages)
        for layer in degrees.virtual_stage_layers(num_layers, stage, index)
    ]


def vision_parameters(run: RunConfig) -> list[Parameters]:
    """Return the parameters of ViT and projector, which every vision rank holds whole."""
    counts = _part_counts(run.model)
    parts: tuple[Part, ...] = ("vision", "projector")
    held = [Parameters(part=part, is_expert=False, count=counts[part]) for part in parts]
    return held + _vision_adapters(run)


@functools.lru_cache(maxsize=8)
def _part_counts(model: ModelConfig) -> dict[Part, int]:
    return count_parameters(parameter_shapes(model))


def decoder_parameters(run: RunConfig, stage: int) -> list[Parameters]:
    """Return the decoder's and the indexers' parameters on one rank of a pipeline stage."""
    degrees = run.parallel.decoder
    layers = stage_layers(run, stage)
    sharers = {"nobody": 1, "tensor": degrees.tensor, "expert": degrees.expert}
    outside = {"embed_tokens": stage == 0, "norm": stage == degrees.pipeline - 1}
    outside["lm_head"] = outside["norm"]
    held: list[Parameters] = []
    for where, part, axis, size in _decoder_tensors(run.model):
        num_held = len(layers) if where == "layer" else int(outside[where])
        if num_held:
            count = num_held * (size // sharers[axis])
            held.append(Parameters(part=part, is_expert=axis == "expert", count=count))
    return held + _decoder_adapters(run, len(layers))


@functools.lru_cache(maxsize=8)
def _decoder_tensors(model: ModelConfig) -> tuple[tuple[str, Part, str, int], ...]:
    """Return the elements of tensors that stand in one place ("layer" for those of each layer),
    are of one part, and are shared along one axis.
    """
    found: Counter[tuple[str, Part, str]] = Counter()
    for name, shape in parameter_shapes(model).items():
        part, words = part_of(name), name.split(".")
        if part in ("vision", "projector"):
            continue
        if not name.startswith("model.layers."):
            where = words[0] if words[0] == "lm_head" else words[1]
            found[where, part, "nobody" if where == "norm" else "tensor"] += prod(shape)
        elif words[2] == "0":
            found["layer", part, _axis(name)] += prod(shape)
    return tuple((*key, count) for key, count in found.items())


def _axis(name: str) -> str:
    """Return the axis over whose ranks a layer's weight is split."""
    if _EXPERTS in name:
        return "expert"
    is_projection = name.split(".")[-2] in _SPLIT_BY_TENSOR and ".sa_indexer." not in name
    return "tensor" if is_projection else "nobody"


def _vision_adapters(run: RunConfig) -> list[Parameters]:
    vision, lora = run.model.vision, run.training.lora
    width, merged = vision.hidden_size, vision.hidden_size * vision.merge_size**2
    sizes: dict[Target, int] = {
        "vision": vision.num_layers * (4 * 2 * width + 2 * (width + vision.intermediate_size)),
        "projector": 2 * merged + merged + run.model.decoder.hidden_size,
    }
    return [
        Parameters(part=TARGETS[target], is_expert=False, is_adapter=True, count=lora.rank * size)
        for target, size in sizes.items()
        if lora.is_adapting(target)
    ]


def _decoder_adapters(run: RunConfig, num_layers: int) -> list[Parameters]:
    """Return the adapters of so many layers: inputs and outputs of each linear, times the rank."""
    decoder, degrees, lora = run.model.decoder, run.parallel.decoder, run.training.lora
    width, hidden = decoder.hidden_size, decoder.experts.intermediate_size
    queries, keys = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    # On the hidden states' side, matrices are replicated along the tensor axis.
    attention = 2 * width + (2 * queries + 2 * keys) // degrees.tensor
    expert = (width + 2 * hidden) + (hidden + width)
    num_experts = decoder.experts.num_experts // degrees.expert
    sizes: dict[Target, int] = {"attention": attention, "experts": num_experts * expert}
    return [
        Parameters(
            part="decoder",
            is_expert=target == "experts",
            is_adapter=True,
            count=num_layers * lora.rank * size,
        )
        for target, size in sizes.items()
        if lora.is_adapting(target)
    ]
