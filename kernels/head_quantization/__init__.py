# SPDX-License-Identifier: Apache-2.0
"""Rounding of keys and values to 8 bits, for caches of half the size.

Re-exports the operator's public names.
"""

from megatron_keye.kernels.head_quantization.api import (
    IMPLEMENTATIONS,
    dequantize_heads,
    quantize_heads,
)

__all__ = ["IMPLEMENTATIONS", "dequantize_heads", "quantize_heads"]
