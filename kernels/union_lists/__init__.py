# SPDX-License-Identifier: Apache-2.0
"""Which keys a tile of neighbouring queries needs, each key once.

Re-exports the operator's public names.
"""

from megatron_keye.kernels.union_lists.api import IMPLEMENTATIONS, union_lists
from megatron_keye.kernels.union_lists.reference import TILE_QUERIES, UnionLists

__all__ = ["IMPLEMENTATIONS", "TILE_QUERIES", "UnionLists", "union_lists"]
