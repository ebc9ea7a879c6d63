"""Megatron's router, with float64 probabilities in a float64 run.

Megatron rounds them to float32 whatever moe_router_dtype is, by far the largest error of a float64
run. It also computes the load-balancing loss (Switch Transformer, arXiv:2101.03961, equations 4 to
6), per row.
"""

from typing import cast

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Softmax over the top-k experts of a token, in float32 or, in a float64 run, float64."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts; called by Megatron's router.

        Args:
            logits: [S, 1, E].
            padding_mask: Passed to Megatron's router.

        Returns:
            Probabilities [S, E], 0 for experts not chosen, and bool [S, E], True for chosen ones.
        """
        routed = cast(tuple[Tensor, Tensor], super().routing(logits, padding_mask))
        if logits.dtype != torch.float64:
            return routed
        assert not self.is_aux_loss_enabled(), "balancing loss is attached to the float32 result"
        is_chosen_SE = routed[1]
        logits_SE = logits.flatten(0, 1).masked_fill(~is_chosen_SE, -torch.inf)
        return logits_SE.softmax(dim=-1), is_chosen_SE
