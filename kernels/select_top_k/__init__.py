"""The k best keys of each query, exactly and in ascending order.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.select_top_k.api import IMPLEMENTATIONS, select_top_k

__all__ = ["IMPLEMENTATIONS", "select_top_k"]
