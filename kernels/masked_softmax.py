# SPDX-License-Identifier: Apache-2.0
"""Softmax over the entries that a mask admits, with rows that admit none.

torch's own softmax gives NaN, forward and backward, for a row that is masked throughout; such
rows are ordinary here, as padding and as the first tokens of a document.

Shape letters: T queries, G key-value heads, S keys.
"""

import torch
from torch import Tensor


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of `logits` over the last dimension where `mask` holds, else 0.

    Args:
        logits: Float tensor, finite where `mask` holds; anything but NaN elsewhere.
        mask: bool, broadcastable to `logits`.

    Returns:
        Shape and type of `logits`; all 0 in a row without any admitted entry. Gradients are 0
        wherever `mask` does not hold.
    """
    return torch.softmax(_fill_outside(logits, mask), dim=-1).masked_fill(~mask, 0)


def masked_divergence(logits_TS: Tensor, target_TGS: Tensor, mask_TS: Tensor) -> Tensor:
    """Return kl_TG = KL(target || softmax of the logits where the mask holds), in nats.

    Args:
        logits_TS: Float tensor, finite where the mask holds; anything but NaN elsewhere.
        target_TGS: Type of `logits_TS`: probabilities over S, 0 outside the mask; 0 log 0 is 0.
        mask_TS: bool.
    """
    log_softmax_TS = torch.log_softmax(_fill_outside(logits_TS, mask_TS), dim=-1)
    log_softmax_TS = log_softmax_TS.masked_fill(~mask_TS, 0)  # -inf times a target of 0 is NaN
    negative_entropy_TG: Tensor = torch.special.xlogy(target_TGS, target_TGS).sum(dim=2)
    cross_TG: Tensor = torch.einsum("tgs,ts->tg", target_TGS, log_softmax_TS)
    return negative_entropy_TG - cross_TG


def _fill_outside(logits: Tensor, mask: Tensor) -> Tensor:
    """Put -inf outside the mask, and 0 throughout rows that would be -inf alone.

    The NaN of such rows would be masked again on both ways, but anomaly detection stops at it.
    """
    admits_none = ~mask.any(dim=-1, keepdim=True)
    return logits.masked_fill(~mask, -torch.inf).masked_fill(admits_none, 0)
