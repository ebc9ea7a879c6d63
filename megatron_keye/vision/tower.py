# SPDX-License-Identifier: Apache-2.0
"""The vision part of the model: encoder and projector as one module.

Shape letters: P patches, M merged tokens, D decoder hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_keye.config import VisionConfig
from megatron_keye.kernels.drawn_normal import fill_normal
from megatron_keye.vision.encoder import VisionEncoder
from megatron_keye.vision.patch_grids import PatchGrid
from megatron_keye.vision.projector import Projector

_INIT_STD = 0.02
"""Standard deviation of freshly initialised weights."""


class VisionTower(nn.Module):
    """Maps patches of packed frames to embeddings of the decoder's hidden size."""

    def __init__(self, config: VisionConfig, decoder_hidden_size: int) -> None:
        """Allocate the parameters; call `reset_parameters` or load a checkpoint before use.

        Args:
            config: Sizes of the encoder and of the merge.
            decoder_hidden_size: D.
        """
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.projector = Projector(config, decoder_hidden_size)

    def forward(self, patches_PCXX: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Encode and project packed frames.

        Args:
            patches_PCXX: [P, 3, patch, patch], normalised pixels in the parameters' dtype, each
                frame's patches in raster order.
            patch_grids: Patches down and across each frame, multiples of merge_size; may be empty.

        Returns:
            merged_MD, one row for each merge_size x merge_size cell, in raster order.

        Raises:
            ValueError: When patches or patch_grids do not fit the configuration or each other.
        """
        merged_MD: Tensor = self.projector(self.encoder(patches_PCXX, patch_grids), patch_grids)
        return merged_MD

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise every parameter from `seed` alone: equally on every rank, device and dtype.

        Weights are normal with standard deviation 0.02, biases 0, norms 1. A number depends on the
        name and the place of its weight; it is rounded from float32 to the parameter's type.

        Args:
            seed: Any integer.
        """
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, nn.LayerNorm):
                    parameter.fill_(1)
                else:
                    fill_normal(parameter, f"{seed}/vision.{prefix}.{name}", std=_INIT_STD)
