# SPDX-License-Identifier: Apache-2.0
"""Rounding of the indexer's queries and keys to 8 bits, the same in training and inference.

Re-exports the operator's public names.
"""

from megatron_keye.kernels.indexer_quantization.api import (
    IMPLEMENTATIONS,
    dequantize,
    quantize,
    round_to_fp8,
    split_rounded,
)

__all__ = ["IMPLEMENTATIONS", "dequantize", "quantize", "round_to_fp8", "split_rounded"]
