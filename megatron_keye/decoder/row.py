"""What every attention layer needs to know about the row it works on.

Built once a row and handed through Megatron's block, so that no layer computes it again and
nothing travels through globals.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import Phase
from megatron_keye.decoder.positions import rotary_table


@dataclass
class RowMeter:
    """Adds up what layers measure on the way, without a host synchronisation."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Float tensors by name."""

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` (detached) to the sum called `name`."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


@dataclass(frozen=True, kw_only=True)
class DecoderRow:
    """One row as a decoder rank sees it; S is the row's length, T = S/CP the local queries."""

    key_start_T: Tensor
    """int64 [S/CP]: first key that a query may see."""
    key_end_T: Tensor
    """int64 [S/CP]: one past the last key that a query may see."""
    is_real_T: Tensor
    """bool [S/CP]: False for padding."""
    gathered_order_S: Tensor
    """int64 [S]: order that puts gathered keys into row order."""
    context_group: dist.ProcessGroup
    """Ranks that share the row's tokens."""
    attention_rotary: tuple[Tensor, Tensor]
    """cos and sin, float32 [S/CP, C]."""
    indexer_rotary: tuple[Tensor, Tensor]
    """cos and sin, float32 [S/CP, J]."""
    phase: Phase
    """Which attention runs and which indexer loss."""
    indexer_loss_weight: float
    """What one query's KL weighs in the sum that is divided by the number of loss tokens."""
    meter: RowMeter
    """Where layers report."""


def rotary_tables(
    position_ids_3T: Tensor, decoder: DecoderConfig
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the rotary tables of the attention and of the indexer.

    The indexer has frequencies of its own over its own width, with the sections scaled to it.
    """
    width, narrow = decoder.head_dim, decoder.indexer.head_dim
    scaled = [section * narrow // width for section in decoder.rope_sections]
    with torch.no_grad():
        return (
            rotary_table(position_ids_3T, width, decoder.rope_sections, decoder.rope_theta),
            rotary_table(position_ids_3T, narrow, scaled, decoder.rope_theta),
        )
