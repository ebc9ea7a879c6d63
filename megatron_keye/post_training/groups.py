# SPDX-License-Identifier: Apache-2.0
"""Groups of answers to one prompt: what each is worth beside the others, and which groups teach.

Source: advantages as in arXiv 2507.18071, equation 6; leaving out groups of equal rewards as in
DAPO (Yu et al., arXiv 2503.14476, section 3.2), here with a limit.
"""

import numpy as np
from numpy.typing import NDArray

_DELTA = 1e-6
"""Added to the standard deviation."""
_EQUAL = 1e-9
"""Rewards of a group that differ by no more than this are equal."""


def advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (reward - mean) / (standard deviation + 1e-6) of each answer of a group.

    Mean and standard deviation, that of a population, are over the answers that were scored.

    Args:
        rewards: [G], NaN for an answer that was not scored.

    Returns:
        [G], NaN for the same answers.
    """
    if np.isnan(rewards).all():
        return np.full_like(rewards, np.nan)
    return (rewards - np.nanmean(rewards)) / (np.nanstd(rewards) + _DELTA)


def has_variance(rewards: NDArray[np.float64]) -> bool:
    """Return whether any two scored answers of a group have different rewards."""
    scored = rewards[~np.isnan(rewards)]
    return len(scored) > 1 and float(np.ptp(scored)) > _EQUAL
