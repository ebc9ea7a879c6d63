# SPDX-License-Identifier: Apache-2.0
"""The vision transformer: patches of packed frames to one feature per patch.

Frames (or images) of any size are concatenated without padding; attention is within each frame.
Parameters are named as in the released checkpoint, below `visual.vision_model`.

Shape letters: P patches, W vision hidden size, H heads, C channels of a head, N frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_keye.config import VisionConfig
from megatron_keye.kernels.rotary import rotate
from megatron_keye.vision.patch_grids import PatchGrid, check_patch_grids, split_runs
from megatron_keye.vision.positions import packed_positions
from megatron_keye.vision.rotary import rotary_tables


class VisionEncoder(nn.Module):
    """Native-resolution pre-norm ViT with learned and 2-D rotary positions.

    Source: arXiv 2606.10651, vision encoder (SigLIP so400m with 2-D rotary positions).
    """

    def __init__(self, config: VisionConfig) -> None:
        """Allocate the parameters; `VisionTower` initialises them."""
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = LayerStack(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches_PCXX: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Encode packed frames.

        Args:
            patches_PCXX: [P, 3, patch, patch], normalised pixels in the parameters' dtype, each
                frame's patches in raster order.
            patch_grids: Patches down and across each frame; if empty, there are no features, and
                the backward pass gives every parameter a gradient of 0.

        Returns:
            features_PW, in the parameters' dtype.

        Raises:
            ValueError: When patches have another shape or number than the patch_grids say.
        """
        patch_size = self.config.patch_size
        if patches_PCXX.shape[1:] != (3, patch_size, patch_size):
            raise ValueError(
                f"patches_PCXX: got shape {tuple(patches_PCXX.shape)}, expected "
                f"[P, 3, {patch_size}, {patch_size}]; cut frames by model.vision.patch_size"
            )
        check_patch_grids(patches_PCXX, patch_grids, "patches_PCXX")
        features_PW = self.embeddings(patches_PCXX, patch_grids)
        features_PW = self.encoder(features_PW, patch_grids)
        normed_PW: Tensor = self.post_layernorm(features_PW)
        return normed_PW


class PatchEmbeddings(nn.Module):
    """Linear embedding of a patch's pixels plus its interpolated learned position."""

    def __init__(self, config: VisionConfig) -> None:
        """Allocate the position tables and the convolution that holds the linear map."""
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(side * side, width)
        if config.num_packing_positions > 0:
            # Converted with checkpoints but never used, as in the released model.
            self.packing_position_embedding = nn.Embedding(config.num_packing_positions, width)
            self.packing_position_embedding.requires_grad_(False)

    def forward(self, patches_PCXX: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Return features_PW of patches [P, 3, patch, patch]."""
        # A convolution whose stride equals its kernel size is a linear map of each patch.
        weight = self.patch_embedding.weight.flatten(1)
        embedded_PW = functional.linear(patches_PCXX.flatten(1), weight, self.patch_embedding.bias)
        return embedded_PW + packed_positions(self.position_embedding.weight, patch_grids)


class LayerStack(nn.Module):
    """All layers, and the rotary tables that they share."""

    def __init__(self, config: VisionConfig) -> None:
        """Allocate `config.num_layers` layers."""
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.rope_theta = config.rope_theta
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, features_PW: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Return features_PW after the last layer, before the final norm."""
        # At least float32: bf16 is too coarse for the angles of patches far from the origin.
        dtype = torch.promote_types(features_PW.dtype, torch.float32)
        cos_PC, sin_PC = rotary_tables(
            patch_grids, self.head_dim, self.rope_theta, dtype=dtype, device=features_PW.device
        )
        for layer in self.layers:
            features_PW = layer(features_PW, patch_grids, cos_PC, sin_PC)
        return features_PW


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: VisionConfig) -> None:
        """Allocate one layer."""
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = FrameAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(config)

    def forward(
        self, features_PW: Tensor, patch_grids: Sequence[PatchGrid], cos_PC: Tensor, sin_PC: Tensor
    ) -> Tensor:
        """Return features_PW after this layer."""
        normed_PW = self.layer_norm1(features_PW)
        features_PW = features_PW + self.self_attn(normed_PW, patch_grids, cos_PC, sin_PC)
        changed_PW: Tensor = features_PW + self.mlp(self.layer_norm2(features_PW))
        return changed_PW


class FrameAttention(nn.Module):
    """Bidirectional attention among the patches of one frame."""

    def __init__(self, config: VisionConfig) -> None:
        """Allocate the four projections."""
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, features_PW: Tensor, patch_grids: Sequence[PatchGrid], cos_PC: Tensor, sin_PC: Tensor
    ) -> Tensor:
        """Return features_PW: attention of each patch over its frame, projected."""
        heads = (self.num_heads, -1)
        q_PHC = rotate(self.q_proj(features_PW).unflatten(1, heads), cos_PC, sin_PC)
        k_PHC = rotate(self.k_proj(features_PW).unflatten(1, heads), cos_PC, sin_PC)
        v_PHC = self.v_proj(features_PW).unflatten(1, heads)
        mixed_PHC = attend_within_frames(q_PHC, k_PHC, v_PHC, patch_grids)
        mixed_PW: Tensor = self.out_proj(mixed_PHC.flatten(1))
        return mixed_PW


def attend_within_frames(
    q_PHC: Tensor, k_PHC: Tensor, v_PHC: Tensor, patch_grids: Sequence[PatchGrid]
) -> Tensor:
    """Return attention [P, H, C] of each patch to all patches of its frame.

    Consecutive frames of equal size are one batched call, so that nothing is padded.

    Args:
        q_PHC: Queries, any float type; logits are scaled by C^-0.5.
        k_PHC: Keys.
        v_PHC: Values.
        patch_grids: Patches down and across each frame.
    """
    # An empty slice keeps all three in the graph when there is no frame.
    parts = [(q_PHC + k_PHC + v_PHC)[:0]]
    runs = zip(*(split_runs(packed, patch_grids) for packed in (q_PHC, k_PHC, v_PHC)), strict=True)
    for run in runs:
        q_NHPC, k_NHPC, v_NHPC = (part.transpose(1, 2) for _, part in run)
        mixed_NHPC = functional.scaled_dot_product_attention(q_NHPC, k_NHPC, v_NHPC)
        parts.append(mixed_NHPC.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


class FeedForward(nn.Module):
    """Two linear maps around a GELU (tanh approximation)."""

    def __init__(self, config: VisionConfig) -> None:
        """Allocate both maps."""
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, features_PW: Tensor) -> Tensor:
        """Return features_PW, patch by patch."""
        widened = functional.gelu(self.fc1(features_PW), approximate="tanh")
        narrowed_PW: Tensor = self.fc2(widened)
        return narrowed_PW
