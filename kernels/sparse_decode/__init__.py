# SPDX-License-Identifier: Apache-2.0
"""Sparse attention of a few new tokens over a paged cache.

Re-exports the operator's public names.
"""

from megatron_keye.kernels.sparse_decode.api import IMPLEMENTATIONS, sparse_decode
from megatron_keye.kernels.sparse_decode.reference import PagedCache

__all__ = ["IMPLEMENTATIONS", "PagedCache", "sparse_decode"]
