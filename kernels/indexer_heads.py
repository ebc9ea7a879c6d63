# SPDX-License-Identifier: Apache-2.0
"""How the indexer's heads make one score, the same for a whole range and for selected keys.

Shape letters: T queries, S keys, I indexer heads.
"""

import math

import torch
from torch import Tensor


def sum_indexer_heads(dots_TIS: Tensor, gate_TI: Tensor, *, num_channels: int) -> Tensor:
    """Return scores_TS: J^-0.5 * sum over heads of gate * relu(q . k), in the products' type.

    Args:
        dots_TIS: The products q . k, in the accumulation type.
        gate_TI: Weight of each head, any float type.
        num_channels: J, channels of an indexer head.

    Source: arXiv 2606.10651, lightning indexer.
    """
    sums_TS: Tensor = torch.einsum("ti,tis->ts", gate_TI.to(dots_TIS.dtype), dots_TIS.relu())
    return sums_TS / math.sqrt(num_channels)
