# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens that each expert gets, by hooks on Megatron's routers."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_keye.config.model import DecoderConfig


class RouterLoad:
    """Tokens by layer and expert in one step, as routed on this rank."""

    def __init__(
        self, decoder: DecoderConfig, stages: list[DistributedDataParallel], device: torch.device
    ) -> None:
        """Register hooks on the routers of all stages.

        Args:
            decoder: Number of layers and experts.
            stages: Virtual stages of this rank.
            device: Device of the counts.
        """
        size = (decoder.num_layers, decoder.experts.num_experts)
        self.counts_LE = torch.zeros(size, dtype=torch.float64, device=device)
        """float64 [layers, experts]; a token counts once for each expert that it is routed to."""
        for stage in stages:
            for module in stage.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._make_hook())

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts_LE.zero_()

    def _make_hook(self) -> Callable[[torch.nn.Module, Any, tuple[Tensor, Tensor]], None]:
        def count(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
            # A recomputed layer runs twice; only the pass with gradients counts.
            if torch.is_grad_enabled():
                self.counts_LE[router.layer_number - 1] += output[1].sum(dim=0)

        return count
