# SPDX-License-Identifier: Apache-2.0
"""Fits the size of a frame whose attention takes as long as the rest of the ViT, from timings."""

from collections.abc import Sequence

import numpy as np

from megatron_keye.errors import UserError


def fit_break_even(frames: Sequence[Sequence[int]], seconds: Sequence[float]) -> int:
    """Fit seconds = a x patches + b x the sum of squared frame sizes, and return a / b.

    Args:
        frames: Patches of each frame of every timed call.
        seconds: Time of each call.

    Raises:
        UserError: If either coefficient is not positive.
    """
    terms = np.array([[sum(sizes), sum(size**2 for size in sizes)] for sizes in frames], float)
    # Least squares of relative errors, so that every call has the same weight.
    scaled = terms / np.asarray(seconds)[:, None]
    linear, quadratic = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
    if linear <= 0 or quadratic <= 0:
        raise UserError(
            f"--fit-vision: got {linear:.3g} s per patch and {quadratic:.3g} s per pair, expected "
            "both above 0; measure on an idle device"
        )
    return max(1, round(float(linear / quadratic)))
