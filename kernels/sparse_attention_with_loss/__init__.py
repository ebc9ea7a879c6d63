# SPDX-License-Identifier: Apache-2.0
"""Attention over the selected keys together with the loss that teaches the indexer from it.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.sparse_attention_with_loss.api import (
    IMPLEMENTATIONS,
    sparse_attention_with_loss,
)

__all__ = ["IMPLEMENTATIONS", "sparse_attention_with_loss"]
