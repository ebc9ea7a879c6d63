# SPDX-License-Identifier: Apache-2.0
"""What a label weighs in the loss: long answers count by their tokens, or less.

Applied when samples are packed, so that a store serves any weighting.
"""

import math

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.data import LossWeighting


def loss_weights(weights: NDArray[np.float32], weighting: LossWeighting) -> NDArray[np.float32]:
    """Return the weights of one sample's labels under a weighting.

    The loss is divided by the sum of all weights of a step, so their scale does not matter, and
    none is applied: under "sample" a sample whose turns all weigh 1 adds 1 to the divisor, under
    "root" the square root of its labels, under "token" their number.

    Args:
        weights: What the turns weigh [T]; 0 where there is no label.
        weighting: "token" leaves them as they are, "sample" divides by n, "root" by sqrt(n), where
            n is the number of the sample's labels. A turn's own weight stays relative to turns of
            other samples.

    Returns:
        float32 [T].

    Source: InternVL 2.5 (arXiv:2412.05271), its square averaging, for "root".
    """
    num_labels = max(1, int(np.count_nonzero(weights)))
    divisor = {"token": 1.0, "sample": float(num_labels), "root": math.sqrt(num_labels)}[weighting]
    return weights / np.float32(divisor)
