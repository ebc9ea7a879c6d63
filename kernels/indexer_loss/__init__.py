"""How far the indexer's distribution over keys is from the attention it serves.

Re-exports the operator's public functions.
"""

from megatron_keye.kernels.indexer_loss.api import (
    IMPLEMENTATIONS,
    dense_indexer_loss,
    sparse_indexer_loss,
)

__all__ = ["IMPLEMENTATIONS", "dense_indexer_loss", "sparse_indexer_loss"]
