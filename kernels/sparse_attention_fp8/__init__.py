# SPDX-License-Identifier: Apache-2.0
"""Attention over selected keys and values of 8 bits, for inference.

Re-exports the operator's public function.
"""

from megatron_keye.kernels.sparse_attention_fp8.api import IMPLEMENTATIONS, sparse_attention_fp8

__all__ = ["IMPLEMENTATIONS", "sparse_attention_fp8"]
