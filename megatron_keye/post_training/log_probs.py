# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of the tokens of all answers of a step, from the ranks that ran them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.parallel.grid import Grid


def gather_log_probs(
    noted: Sequence[tuple[Tensor, Tensor]], num_tokens: int, grid: Grid, device: torch.device
) -> NDArray[np.float64]:
    """Return the log-probability of each token. Collective: all ranks must call it.

    Args:
        noted: `RowMeter.log_probs` of this rank.
        num_tokens: Tokens of all answers of the step.
        grid: Groups of this rank.
        device: Where this rank computes.

    Returns:
        [num_tokens]; NaN for tokens that no rank ran.
    """
    # Values, and how often each was noted: a row's labels are cut over context ranks alone.
    sums = torch.zeros(2, num_tokens, dtype=torch.float64, device=device)
    if grid.decoder is not None and grid.place().tensor == 0:
        for places_L, log_probs_L in noted:
            sums[0].index_add_(0, places_L, log_probs_L.double())
            sums[1].index_add_(0, places_L, torch.ones_like(places_L, dtype=torch.float64))
    dist.all_reduce(sums)
    values, counts = sums.cpu().numpy()
    assert counts.max(initial=0) <= 1, "each token of an answer is a label once"
    return np.where(counts > 0, values, np.nan)
