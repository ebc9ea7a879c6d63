# SPDX-License-Identifier: Apache-2.0
"""Converts weights of modules in this process from and to the released checkpoint's tensors.

Applies the converter's table to parameters instead of files, and to gradients too, so that they
have the checkpoint's names and shapes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.folder import HfFolder
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout
from megatron_keye.checkpoint.hf.weight_map import WeightMapping, weight_mappings
from megatron_keye.config import ModelConfig

_LAYERS = "block.layers."
_EXPERTS = "mlp.experts.experts."


def parameter_of(parameters: Mapping[str, Tensor], mapping: WeightMapping) -> Tensor:
    """Return the native weight of a mapping: a parameter, or one expert's part of it.

    Args:
        parameters: Those of modules that hold all layers and experts, by name; a decoder stage's
            with the prefix "decoder.", the vision tower's with "vision.".
        mapping: The weight.
    """
    layer, expert, *_ = (*mapping.stacked_index, None, None)
    name = mapping.key.replace(_LAYERS, f"{_LAYERS}{layer}.").replace(_EXPERTS, "mlp.experts.")
    return parameters[name] if expert is None else parameters[name][expert]


@torch.no_grad()
def load_released(weights: Mapping[str, Tensor], folder: HfFolder) -> None:
    """Fill parameters from a checkpoint folder, in their own type.

    Args:
        weights: All parameters, as for `parameter_of`.
        folder: The checkpoint.
    """
    for mapping in weight_mappings(folder.model, folder.layout):
        parts = [folder.entries[part.name].read(part.index) for part in mapping.parts]
        parameter_of(weights, mapping).copy_(torch.cat(mapping.arrangement.join(parts)))


def as_released(
    weights: Mapping[str, Tensor], model: ModelConfig, layout: ExpertLayout
) -> dict[str, Tensor]:
    """Return parameters, or anything of their shapes, as the tensors of a checkpoint.

    Args:
        weights: All parameters, as for `parameter_of`.
        model: Sizes.
        layout: Expert layout of the checkpoint.
    """
    whole: dict[str, Tensor] = {}
    slices: dict[str, list[Tensor]] = {}
    for mapping in weight_mappings(model, layout):
        tensors = mapping.arrangement.split(parameter_of(weights, mapping))
        for part, tensor in zip(mapping.parts, tensors, strict=True):
            if part.index is None:
                whole[part.name] = tensor
            else:
                slices.setdefault(part.name, []).append(tensor)
    return whole | {name: torch.stack(parts) for name, parts in slices.items()}
