# SPDX-License-Identifier: Apache-2.0
"""The k best keys of each query, exactly and in ascending order.

Re-exports the operator's public functions.
"""

from megatron_keye.kernels.select_top_k.api import IMPLEMENTATIONS, fastest_impl, select_top_k

__all__ = ["IMPLEMENTATIONS", "fastest_impl", "select_top_k"]
