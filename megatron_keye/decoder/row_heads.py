# SPDX-License-Identifier: Apache-2.0
"""What one layer's projections make of a row, with keys and values on their way between ranks.

Shape letters: S positions of the row, T = S/CP local queries, H query heads, G key-value heads,
C channels of a head, I indexer heads, J indexer channels.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_keye.parallel.context import RowGather


@dataclass(frozen=True)
class RowHeads:
    """Rotated queries of the local tokens, and keys and values of the whole row."""

    q_THC: Tensor
    """Queries."""
    gather: RowGather
    """Gives k_SGC, rotated, and v_SGC."""


@dataclass(frozen=True)
class RowIndexerHeads:
    """The indexer's queries and gates of the local tokens, and its keys of the whole row."""

    q_TIJ: Tensor
    """Queries."""
    gather: RowGather
    """Gives k_SJ."""
    gate_TI: Tensor
    """Weights of the heads."""
