# SPDX-License-Identifier: Apache-2.0
"""The projector: merges neighbouring patches into one token of the decoder's hidden size.

Parameters are named as in the released checkpoint, below `mlp_AR`.

Shape letters: P patches, M merged tokens, W vision hidden size, D decoder hidden size, N frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_keye.config import VisionConfig
from megatron_keye.vision.patch_grids import PatchGrid, check_patch_grids, split_runs

_NORM_EPS = 1e-5
"""Epsilon of the projector's LayerNorm; a constant of the released code."""


class Projector(nn.Module):
    """Merges merge_size x merge_size patches, then LayerNorm and an MLP with exact GELU."""

    def __init__(self, config: VisionConfig, decoder_hidden_size: int) -> None:
        """Allocate the parameters; `VisionTower` initialises them.

        Args:
            config: Sizes of the encoder and of the merge.
            decoder_hidden_size: D.
        """
        super().__init__()
        self.merge_size = config.merge_size
        merged_width = config.hidden_size * config.merge_size**2
        self.pre_norm = nn.LayerNorm(merged_width, eps=_NORM_EPS)
        self.linear_1 = nn.Linear(merged_width, merged_width)
        self.linear_2 = nn.Linear(merged_width, decoder_hidden_size)

    def forward(self, features_PW: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Project packed frames.

        Args:
            features_PW: Output of the encoder, each frame in raster order.
            patch_grids: Patches down and across each frame, multiples of merge_size; may be empty.

        Returns:
            merged_MD, each frame's merged tokens in raster order.

        Raises:
            ValueError: When a patch grid is no multiple of merge_size, or patches do not add up.
        """
        check_patch_grids(features_PW, patch_grids, "features_PW", multiple=self.merge_size)
        normed = self.pre_norm(merge_neighbours(features_PW, patch_grids, self.merge_size))
        merged_MD: Tensor = self.linear_2(functional.gelu(self.linear_1(normed)))
        return merged_MD


def merge_neighbours(
    features_PW: Tensor, patch_grids: Sequence[PatchGrid], merge_size: int
) -> Tensor:
    """Return each cell of merge_size x merge_size patches as one vector [M, merge_size^2 * W].

    A vector concatenates the cell's patches in raster order.

    Args:
        features_PW: Each frame in raster order.
        patch_grids: Patches down and across each frame, multiples of `merge_size`.
        merge_size: Side of a cell, in patches.
    """
    parts = [features_PW[:0].reshape(0, merge_size**2 * features_PW.shape[1])]
    for (height, width), part_NPW in split_runs(features_PW, patch_grids):
        cells = part_NPW.unflatten(
            1, (height // merge_size, merge_size, width // merge_size, merge_size)
        )
        parts.append(cells.transpose(2, 3).flatten(3).flatten(0, 2))
    return torch.cat(parts)
