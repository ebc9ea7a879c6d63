# SPDX-License-Identifier: Apache-2.0
"""The rotary positions by their definition, in plain PyTorch."""

import torch
from torch import Tensor


def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Return the rotated heads; see api.rotate."""
    wide_THC = x_THC.to(torch.promote_types(x_THC.dtype, cos_TC.dtype))
    first, second = wide_THC.chunk(2, dim=-1)
    rotated_THC = wide_THC * cos_TC[:, None] + torch.cat([-second, first], -1) * sin_TC[:, None]
    return rotated_THC.to(x_THC.dtype)
