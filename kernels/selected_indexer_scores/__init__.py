# SPDX-License-Identifier: Apache-2.0
"""Scores that the lightning indexer gives to the selected keys of each query.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.selected_indexer_scores.api import (
    IMPLEMENTATIONS,
    selected_indexer_scores,
)

__all__ = ["IMPLEMENTATIONS", "selected_indexer_scores"]
