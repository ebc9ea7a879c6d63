# SPDX-License-Identifier: Apache-2.0
"""Scores that the lightning indexer gives to every key of each query's range.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.indexer_scores.api import IMPLEMENTATIONS, indexer_scores

__all__ = ["IMPLEMENTATIONS", "indexer_scores"]
