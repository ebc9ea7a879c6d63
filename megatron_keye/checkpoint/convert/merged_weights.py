# SPDX-License-Identifier: Apache-2.0
"""Native weights as they act: each one plus what its adapter adds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_keye.checkpoint.convert.native_folder import NativeFolder, Shape
from megatron_keye.config.lora import LORA_A, LORA_B, LoraConfig


@dataclass(frozen=True)
class MergedWeights:
    """Reads the weights of a checkpoint with their adapters added; can be pickled."""

    native: NativeFolder
    """The checkpoint, with adapters or without."""
    lora: LoraConfig
    """How its adapters were trained."""

    def read(self, key: str, stacked_index: Shape) -> Tensor:
        """Return the weight of one layer (and expert), in float32 or better if it has an adapter.

        Args:
            key: Name of the weight.
            stacked_index: Index along the stacked axes; () for a tensor without any.
        """
        weight = self.native.read(key, stacked_index)
        linear = key.removesuffix("weight")
        if linear + LORA_A not in self.native.tensors:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a = self.native.read(linear + LORA_A, stacked_index).to(wide)
        b = self.native.read(linear + LORA_B, stacked_index).to(wide)
        return weight.to(wide) + self.lora.scale * (b @ a)
