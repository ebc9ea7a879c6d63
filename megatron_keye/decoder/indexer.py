# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer's projections: few narrow query heads, one shared key, a gate per head.

Source: DeepSeek Sparse Attention (DeepSeek-V3.2 report), as in the released Keye-VL-2.0 serving
code: query RMSNorm, key LayerNorm, rotary over all channels, optional rounding to 8 bits, gates
without an activation.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_keye.config.model import IndexerConfig
from megatron_keye.kernels.indexer_quantization import round_to_fp8
from megatron_keye.kernels.rotary import rotate

_NORM_EPS = 1e-6
"""A constant of the released code, unlike the epsilon of other norms."""


class Indexer(torch.nn.Module):
    """Projects hidden states to indexer queries, keys and gates; replicated over tensor ranks."""

    def __init__(self, config: TransformerConfig, indexer: IndexerConfig) -> None:
        """Allocate the projections; their weights are initialised later.

        Args:
            config: Hidden size, dtype and device of the weights.
            indexer: Heads, channels and whether queries and keys are rounded.
        """
        super().__init__()
        self.num_heads, self.head_dim = indexer.num_heads, indexer.head_dim
        self.rounds_to_fp8 = indexer.quantization == "fp8"
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        like = {"dtype": config.params_dtype, "device": device}
        num_outputs = self.num_heads * self.head_dim + self.num_heads
        self.q_proj = torch.nn.Linear(config.hidden_size, num_outputs, bias=False, **like)
        self.k_proj = torch.nn.Linear(config.hidden_size, self.head_dim, bias=False, **like)
        self.q_norm = torch.nn.RMSNorm(self.head_dim, eps=_NORM_EPS, **like)
        self.k_norm = torch.nn.LayerNorm(self.head_dim, eps=_NORM_EPS, **like)
        for parameter in self.parameters():
            # Each tensor rank has the loss of its own key-value groups only; with this attribute
            # Megatron all-reduces the gradients over the tensor axis.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Project hidden states, which the caller has detached.

        Args:
            hidden_TD: [T, D], the normalised input of the attention.
            rotary: cos and sin, float32 [T, J].

        Returns:
            Queries [T, I, J], keys [T, J] and gates [T, I]; gates in float32 or better.
        """
        heads_TX, gate_TI = self.q_proj(hidden_TD).split(
            [self.num_heads * self.head_dim, self.num_heads], dim=-1
        )
        q_TIJ = self.q_norm(heads_TX.unflatten(-1, (self.num_heads, self.head_dim)))
        k_TJ = self._normalise_key(self.k_proj(hidden_TD))
        q_TIJ, k_TJ = rotate(q_TIJ, *rotary), rotate(k_TJ[:, None], *rotary).squeeze(1)
        if self.rounds_to_fp8:
            q_TIJ, k_TJ = round_to_fp8(q_TIJ), round_to_fp8(k_TJ)
        wide = torch.promote_types(gate_TI.dtype, torch.float32)
        return q_TIJ, k_TJ, gate_TI.to(wide)

    def _normalise_key(self, k_TJ: Tensor) -> Tensor:
        """Apply LayerNorm in float32 or better, as the released code does."""
        wide = torch.promote_types(k_TJ.dtype, torch.float32)
        norm = self.k_norm
        normed = torch.nn.functional.layer_norm(
            k_TJ.to(wide), (self.head_dim,), norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        return normed.to(k_TJ.dtype)
