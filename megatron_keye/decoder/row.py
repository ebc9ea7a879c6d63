# SPDX-License-Identifier: Apache-2.0
"""The properties of a row that its attention layers share.

Computed once per row and passed through Megatron's block, so that there are no globals.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import Phase
from megatron_keye.decoder.key_cache import RowCache
from megatron_keye.decoder.positions import rotary_table
from megatron_keye.decoder.recomputation import KeptAttention
from megatron_keye.decoder.routes import Routes

MeterName = Literal[
    "language_loss",
    "indexer_kl",
    "recall",
    "recall_queries",
    "pictures",
    "decoded_per_second",
    "ready_chunks",
    "taken_chunks",
]
"""Every sum of a meter; the step's metrics read all of them."""
METER_NAMES: tuple[MeterName, ...] = get_args(MeterName)
"""The same as a tuple."""


@dataclass
class RowMeter:
    """Sums that layers accumulate over rows, without a host synchronisation."""

    sums: dict[MeterName, Tensor] = field(default_factory=dict)
    """Scalars, float64, by name; without those to which this rank adds nothing."""
    log_probs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """In policy training, of each row that this rank ran: places of the tokens of answers [L], and
    their log-probabilities [L], float32 or better."""

    def accumulate(self, name: MeterName, value: Tensor) -> None:
        """Add `value` (detached) to the sum called `name`.

        Raises:
            ValueError: For a name outside METER_NAMES, which no metric would read.
        """
        if name not in METER_NAMES:
            raise ValueError(f"meter: got {name!r}, expected one of {METER_NAMES}")
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
    key_reach_S: Tensor | None = None
    """int64 [S]: see `Batch.key_reach_S`."""
    num_paths_T: Tensor | None = None
    """int64 [S/CP]: see `Batch.num_paths_T`."""
    routes: Routes | None = None
    """Experts of tokens that are routed as they were before; None where routers choose."""
    cache: RowCache | None = None
    """Where keys of earlier tokens are and those of the row go, while generating; None in
    training, where a row holds all its keys."""
    phase: Phase
    """Which attention and which indexer loss run."""
    indexer_loss_weight: float
    """Weight of one query's KL in the sum that is divided by the weight of all labels."""
    meter: RowMeter
    """Receives the layers' measurements."""
    kept: dict[int, KeptAttention] = field(default_factory=dict)
    """By number of a recomputed layer, between its first pass and its second one."""

    @property
    def query_weights(self) -> Tensor:
        """float64 [S/CP]: what each query's KL weighs, 0 for padding.

        A query on several paths counts as often as in rows of one path each.
        """
        weight_T = self.is_real_T.double()
        return weight_T if self.num_paths_T is None else weight_T * self.num_paths_T

    def kl_weights(self) -> Tensor:
        """Return float64 [S/CP]: what each query's KL weighs in the loss, 0 for padding."""
        return self.query_weights * self.indexer_loss_weight

    def meter_kl(self, layer_number: int, kl_TG: Tensor) -> None:
        """Meter a layer's KL [S/CP, G], summed over queries but padding and over its groups."""
        kl_G = (kl_TG * self.query_weights[:, None].to(kl_TG.dtype)).sum(dim=0)
        self.meter.record("indexer_kl", layer_number, kl_G)
        self.meter.accumulate("indexer_kl", kl_G.sum())


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
