# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention over every key of each query's range.

Re-exports the operator's public functions.
"""

from megatron_keye.kernels.dense_attention.api import (
    IMPLEMENTATIONS,
    dense_attention,
    dense_attention_with_lse,
)

__all__ = ["IMPLEMENTATIONS", "dense_attention", "dense_attention_with_lse"]
