# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention over the selected keys of each query.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.sparse_attention.api import IMPLEMENTATIONS, sparse_attention

__all__ = ["IMPLEMENTATIONS", "sparse_attention"]
