"""Megatron's router, whose probabilities follow the type of its logits.

Megatron rounds them to float32 whatever moe_router_dtype says, which would be the largest error
by far of a float64 run. Megatron also computes the load-balancing loss (Switch Transformer,
arXiv:2101.03961, equations 4 to 6), per row.
"""

from typing import cast

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Softmax over the experts that a token visits, in float32 or, in a float64 run, float64."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts; called by Megatron's router.

        Args:
            logits: [S, 1, E].
            padding_mask: Passed on.

        Returns:
            Probabilities [S, E], 0 for experts not visited, and bool [S, E] of those visited.
        """
        routed = cast(tuple[Tensor, Tensor], super().routing(logits, padding_mask))
        if logits.dtype != torch.float64:
            return routed
        assert not self.is_aux_loss_enabled(), "the balancing loss hangs on the float32 result"
        is_visited_SE = routed[1]
        logits_SE = logits.flatten(0, 1).masked_fill(~is_visited_SE, -torch.inf)
        return logits_SE.softmax(dim=-1), is_visited_SE
