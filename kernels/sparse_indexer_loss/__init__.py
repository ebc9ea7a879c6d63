# SPDX-License-Identifier: Apache-2.0
"""How far the indexer's distribution over the selected keys is from the attention it serves.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.sparse_indexer_loss.api import IMPLEMENTATIONS, sparse_indexer_loss

__all__ = ["IMPLEMENTATIONS", "sparse_indexer_loss"]
