# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: pairs of channels rotated by angles, for decoder, indexer and ViT.

Re-exports the operator's public names.
"""

from megatron_keye.kernels.rotary.api import IMPLEMENTATIONS, rotate

__all__ = ["IMPLEMENTATIONS", "rotate"]
