"""Grouped-query attention over every key of each query's range.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.dense_attention.api import IMPLEMENTATIONS, dense_attention

__all__ = ["IMPLEMENTATIONS", "dense_attention"]
