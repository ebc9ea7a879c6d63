# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of each label, from logits whose vocabulary is split over tensor ranks.

Megatron's function rounds to float32, so float64 runs use the one below.
"""

from typing import cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


def token_losses(logits_LBV: Tensor, labels_LB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the cross entropy of each label, in float32 or, for float64 logits, float64.

    Args:
        logits_LBV: [L, 1, V/TP], for this rank's part of the vocabulary.
        labels_LB: int64 [L, 1].
        group: Tensor-parallel group.

    Returns:
        [L, 1], equal on all ranks of the group.
    """
    if logits_LBV.dtype != torch.float64:
        loss_LB = vocab_parallel_cross_entropy(logits_LBV.float(), labels_LB, tp_group=group)
        return cast(Tensor, loss_LB)
    return _exact_losses(logits_LBV, labels_LB, group)


def _exact_losses(logits_LBV: Tensor, labels_LB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return log-sum-exp minus the label's logit, in the dtype of the logits."""
    largest_LB1 = logits_LBV.detach().amax(dim=-1, keepdim=True)
    dist.all_reduce(largest_LB1, op=dist.ReduceOp.MAX, group=group)
    shifted_LBV = logits_LBV - largest_LB1
    size = logits_LBV.shape[-1]
    local_LB1 = (labels_LB - group.rank() * size)[..., None]
    is_mine_LB1 = (local_LB1 >= 0) & (local_LB1 < size)
    picked_LB1 = shifted_LBV.gather(-1, local_LB1.clamp(0, size - 1)).masked_fill(~is_mine_LB1, 0)
    parts = torch.stack([shifted_LBV.exp().sum(dim=-1), picked_LB1.squeeze(-1)])
    total, picked = reduce_from_tensor_model_parallel_region(parts, group=group)
    return cast(Tensor, total.log() - picked)
