"""Softmax over the entries that a mask admits, with rows that admit none.

torch's own softmax gives NaN, forward and backward, for a row that is masked throughout; such
rows are ordinary here, as padding and as the first tokens of a document.
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


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logarithm of `masked_softmax` where `mask` holds, else 0 (never -inf)."""
    return torch.log_softmax(_fill_outside(logits, mask), dim=-1).masked_fill(~mask, 0)


def _fill_outside(logits: Tensor, mask: Tensor) -> Tensor:
    """Put -inf outside the mask, and 0 throughout rows that would be -inf alone.

    The NaN of such rows would be masked again on both ways, but anomaly detection stops at it.
    """
    admits_none = ~mask.any(dim=-1, keepdim=True)
    return logits.masked_fill(~mask, -torch.inf).masked_fill(admits_none, 0)
