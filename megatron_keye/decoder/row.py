"""The properties of a row that its attention layers share.

Computed once per row and passed through Megatron's block, so that there are no globals.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import Phase
from megatron_keye.decoder.positions import rotary_table


@dataclass
class RowMeter:
    """Sums that layers accumulate over rows, without a host synchronisation."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Float tensors by name."""

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add `value` (detached) to the sum called `name`."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def record(self, name: str, layer_number: int, value: Tensor) -> None:
        """Ignore a tensor of one layer; subclasses may keep it.

        Args:
            name: Kind of tensor.
            layer_number: 1-based number of the layer in the whole model.
            value: The tensor, still in the graph.
        """


@dataclass(frozen=True, kw_only=True)
class DecoderRow:
    """A decoder rank's view of one row; S is the row's length, T = S/CP its local queries."""

    key_start_T: Tensor
    """int64 [S/CP]: first key visible to each query."""
    key_end_T: Tensor
    """int64 [S/CP]: one past the last key visible to each query."""
    is_real_T: Tensor
    """bool [S/CP]: False for padding."""
    gathered_order_S: Tensor
    """int64 [S]: index of each row position in keys gathered over the context axis."""
    attention_rotary: tuple[Tensor, Tensor]
    """cos and sin, float32 (float64 in a float64 run) [S/CP, C]."""
    indexer_rotary: tuple[Tensor, Tensor]
    """cos and sin, likewise [S/CP, J]."""
    phase: Phase
    """Which attention and which indexer loss run."""
    indexer_loss_weight: float
    """Weight of one query's KL in the sum that is divided by the number of labelled tokens."""
    meter: RowMeter
    """Receives the layers' measurements."""


def rotary_tables(
    position_ids_3T: Tensor, decoder: DecoderConfig, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the rotary tables of the attention and of the indexer.

    The indexer has frequencies for its own head size, to which the sections are scaled.

    Args:
        position_ids_3T: int64 [3, T].
        decoder: Sizes.
        dtype: Dtype of the weights; the tables are in float32 or better.
    """
    wide = torch.promote_types(dtype, torch.float32)
    width, narrow = decoder.head_dim, decoder.indexer.head_dim
    scaled = [section * narrow // width for section in decoder.rope_sections]
    with torch.no_grad():
        theta, sections = decoder.rope_theta, decoder.rope_sections
        return (
            rotary_table(position_ids_3T, width, sections, theta, dtype=wide),
            rotary_table(position_ids_3T, narrow, scaled, theta, dtype=wide),
        )
