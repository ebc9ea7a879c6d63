# SPDX-License-Identifier: Apache-2.0
"""From indexer queries and keys straight to the selected keys.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.lightning_indexer.api import IMPLEMENTATIONS, lightning_indexer

__all__ = ["IMPLEMENTATIONS", "lightning_indexer"]
