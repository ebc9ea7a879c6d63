"""Scores that the lightning indexer gives to keys, of a whole range or of a selection.

Re-exports the operator's public functions.
"""

from megatron_keye.kernels.indexer_scores.api import (
    IMPLEMENTATIONS,
    indexer_scores,
    selected_indexer_scores,
)

__all__ = ["IMPLEMENTATIONS", "indexer_scores", "selected_indexer_scores"]
