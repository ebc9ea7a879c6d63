# SPDX-License-Identifier: Apache-2.0
"""RMSNorm that supports sequence parallelism on CPU and GPU.

Megatron-Core's torch norm rejects sequence parallelism and its others need a GPU library; with one
module, checkpoints also have the same keys on every machine, whoever computes it.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_keye.decoder.fused_norm import fused_rms_norm


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square over the last dimension, then scale by a learned weight."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        passes_gradients: bool = True,
        is_fused: bool = False,
    ) -> None:
        """Allocate the weight, all ones.

        Args:
            config: Dtype and device of the weight, and whether there is sequence parallelism.
            hidden_size: Size of the normalised dimension.
            eps: Added to the mean square.
            passes_gradients: Whether gradients flow back to the input.
            is_fused: Whether Transformer Engine computes it, on a GPU.
        """
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.eps = eps
        self.passes_gradients, self.is_fused = passes_gradients, is_fused
        # Under sequence parallelism each rank has a part of the tokens; with this attribute
        # Megatron all-reduces the gradient over the tensor axis.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size], in the dtype of x."""
        if not self.passes_gradients:
            x = x.detach()
        if self.is_fused:
            return fused_rms_norm(x, self.weight, self.eps)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
