"""The vision transformer: patches of packed frames to one feature per patch.

Frames of any size stand one behind the other without padding; attention stays within a frame.
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
    """Native-resolution ViT of pre-norm layers with learned and 2-D rotary positions.

    Source: arXiv 2606.10651, vision encoder (SigLIP so400m with 2-D rotary positions).
    """

    def __init__(self, config: VisionConfig) -> None:
        """Make the parameters of `config`'s sizes; `VisionTower` initialises them."""
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = LayerStack(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches_PCXX: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Encode frames packed one behind the other.

        Args:
            patches_PCXX: [P, 3, patch, patch], normalised pixels in the parameters' type, each
                frame's patches in raster order.
            patch_grids: Patches down and across each frame; empty for no frame, which gives no
                feature and, backward, a gradient of 0 for every parameter.

        Returns:
            features_PW, type of the parameters.

        Raises:
            ValueError: When patches have another shape or do not add up to the patch_grids.
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
    """Linear embedding of a patch's pixels plus its stretched learned position."""

    def __init__(self, config: VisionConfig) -> None:
        """Make both tables and the convolution that holds the linear map."""
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(side * side, width)
        if config.num_packing_positions > 0:
            # Only carried between checkpoints: the released model never reads it.
            self.packing_position_embedding = nn.Embedding(config.num_packing_positions, width)
            self.packing_position_embedding.requires_grad_(False)

    def forward(self, patches_PCXX: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Return features_PW of patches [P, 3, patch, patch]."""
        # A convolution whose stride is its kernel is a linear map of each patch.
        weight = self.patch_embedding.weight.flatten(1)
        embedded_PW = functional.linear(patches_PCXX.flatten(1), weight, self.patch_embedding.bias)
        return embedded_PW + packed_positions(self.position_embedding.weight, patch_grids)


class LayerStack(nn.Module):
    """All layers, with the rotary tables that they share."""

    def __init__(self, config: VisionConfig) -> None:
        """Make `config.num_layers` layers."""
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.rope_theta = config.rope_theta
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, features_PW: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
        """Return features_PW after the last layer, not yet normed."""
        # The tables stay at least float32: bf16 has not the digits for the far patches' angles.
        dtype = torch.promote_types(features_PW.dtype, torch.float32)
        cos_PC, sin_PC = rotary_tables(
            patch_grids, self.head_dim, self.rope_theta, dtype=dtype, device=features_PW.device
        )
        for layer in self.layers:
            features_PW = layer(features_PW, patch_grids, cos_PC, sin_PC)
        return features_PW


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, config: VisionConfig) -> None:
        """Make one layer."""
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
        """Make the four projections."""
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
        """Return features_PW, each patch's sum over its own frame."""
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

    A run of equal frames is one batched call; frames of different size never meet, so that
    nothing is padded.

    Args:
        q_PHC: Queries, any float type; logits are scaled by C^-0.5.
        k_PHC: Keys.
        v_PHC: Values.
        patch_grids: PatchGrid of every frame.
    """
    # Starting from no rows of all three keeps them in the graph when there is no frame.
    parts = [(q_PHC + k_PHC + v_PHC)[:0]]
    runs = zip(*(split_runs(packed, patch_grids) for packed in (q_PHC, k_PHC, v_PHC)), strict=True)
    for run in runs:
        q_NHPC, k_NHPC, v_NHPC = (part.transpose(1, 2) for _, part in run)
        mixed_NHPC = functional.scaled_dot_product_attention(q_NHPC, k_NHPC, v_NHPC)
        parts.append(mixed_NHPC.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


class FeedForward(nn.Module):
    """Two linear maps around a GELU in its tanh form."""

    def __init__(self, config: VisionConfig) -> None:
        """Make both maps."""
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, features_PW: Tensor) -> Tensor:
        """Return features_PW, each patch on its own."""
        widened = functional.gelu(self.fc1(features_PW), approximate="tanh")
        narrowed_PW: Tensor = self.fc2(widened)
        return narrowed_PW
