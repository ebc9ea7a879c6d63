# SPDX-License-Identifier: Apache-2.0
"""Eager form of the rounding of keys and values to 8 bits.

It defines the operator: other implementations must return the same bits.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.precision import accumulation_dtype

SMALLEST_PEAK = 1e-30
"""Largest magnitude that a head counts as having at least, so that no scale is 0."""
INVERSE_LARGEST = 1 / 448
"""Of the largest e4m3 number; a product, since a GPU's division by a number need not be exact."""


def quantize_heads(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales; see api.quantize_heads."""
    wide = heads.to(accumulation_dtype(heads))
    scales = wide.abs().amax(dim=-1).float().clamp(min=SMALLEST_PEAK) * INVERSE_LARGEST
    return (wide / scales[..., None]).to(torch.float8_e4m3fn).contiguous(), scales


def dequantize_heads(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the heads; see api.dequantize_heads."""
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * scales[..., None].to(wide)).to(dtype).contiguous()
