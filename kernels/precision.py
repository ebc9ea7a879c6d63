# SPDX-License-Identifier: Apache-2.0
"""The type in which eager operators accumulate.

One rule for all of them, so that a float64 run is float64 throughout and bf16 never sums in bf16.
"""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 when any of `tensors` is float64, otherwise float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
