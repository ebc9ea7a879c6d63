# SPDX-License-Identifier: Apache-2.0
"""Megatron's router, in the precision of the run, and for a rank without tokens.

Megatron rounds probabilities to float32 whatever moe_router_dtype is, by far the largest error of
a float64 run. It also computes the load-balancing loss (Switch Transformer, arXiv:2101.03961,
equations 4 to 6), per row. Where Transformer Engine is installed it multiplies with its GEMM,
which rounds float32 to TF32, 10 bits of mantissa; bfloat16 loses nothing by that.

A row of training has tokens on every rank. Whoever runs a layer on parts of other lengths may have
none on some, whose experts the others still need; there megatron-core 0.19.2 neither shapes the
logits nor divides the balancing loss.
"""

from typing import Any, cast

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_keye.decoder.routes import KnownChoice


class Router(TopKRouter):
    """Softmax over the top-k experts of a token, in float32 or, in a float64 run, float64."""

    def gating(self, input: Tensor) -> Tensor:
        """Compute logits; called by Megatron's router.

        Args:
            input: [S, 1, D]; S may be 0.

        Returns:
            [S, 1, E]. The backward pass gives the weight a gradient, zeros where S is 0.
        """
        if input.dtype == torch.bfloat16 and input.numel():
            return cast(Tensor, super().gating(input))
        wide = torch.promote_types(input.dtype, torch.float32)
        return torch.nn.functional.linear(input.to(wide), self.weight.to(wide))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts; called by Megatron's router.

        Args:
            logits: [S, 1, E].
            padding_mask: What `DecoderLayer` passes under this name: bool [S, E], known experts of
                tokens, none of those for which this chooses; None if it does for all.

        Returns:
            Probabilities [S, E], 0 for experts not chosen, and bool [S, E], True for chosen ones.
        """
        if logits.numel() == 0:
            # No kernel runs over nothing; the experts still need a gradient's way back.
            no_tokens_SE = logits.flatten(0, 1)
            return no_tokens_SE, no_tokens_SE.bool()
        self.router_replay = KnownChoice(padding_mask) if padding_mask is not None else None
        routed = cast(tuple[Tensor, Tensor], super().routing(logits))
        if logits.dtype != torch.float64:
            return routed
        assert not self.is_aux_loss_enabled(), "balancing loss is attached to the float32 result"
        is_chosen_SE = routed[1]
        logits_SE = logits.flatten(0, 1).masked_fill(~is_chosen_SE, -torch.inf)
        return logits_SE.softmax(dim=-1), is_chosen_SE

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *arguments: Any, **options: Any
    ) -> Tensor:
        """Attach the balancing loss; a row without tokens has none, on all ranks that share it."""
        if scores_for_aux_loss.shape[0] == 0:
            return probs
        attached = super()._apply_aux_loss(probs, scores_for_aux_loss, *arguments, **options)
        return cast(Tensor, attached)
