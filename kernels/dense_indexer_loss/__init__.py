# SPDX-License-Identifier: Apache-2.0
"""How far the indexer's distribution over whole ranges is from the attention it will serve.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.dense_indexer_loss.api import IMPLEMENTATIONS, dense_indexer_loss

__all__ = ["IMPLEMENTATIONS", "dense_indexer_loss"]
