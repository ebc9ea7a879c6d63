# SPDX-License-Identifier: Apache-2.0
"""The rows of a step as a prediction needs them: their counts, and rates for their lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.estimate.account import row_works
from megatron_keye.estimate.account.counts import RowCounts, count_rows
from megatron_keye.estimate.prediction.operators import (
    DENSE_BACKWARD,
    DENSE_FORWARD,
    DENSE_LOSS,
    SELECTED_BACKWARD,
    SELECTED_FORWARD,
    SELECTED_LOSS,
    UNION_KEYS,
    effective,
)
from megatron_keye.plan.slots import RowSizes, balanced_order

_RELEASED_TOP_K = 2048
"""For which unions of selections were measured."""


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of what depends on the lengths of documents, on an H100."""

    attention_forward: float
    """Of attention, dense or to selected keys."""
    attention_backward: float
    """That of its backward pass."""
    loss: float
    """Of the indexer's loss."""


@dataclass
class RowMix:
    """Rows of a global batch; what depends on few degrees is computed once."""

    rows: Sequence[RowSizes]
    """Sizes of each row."""
    run: RunConfig
    """Its model, phase and row length; degrees do not count."""
    union_keys: float = 0.0
    """Keys that 16 neighbouring queries select together; 0: by `UNION_KEYS`."""
    frames_per_picture: float = 12.0
    """Frames of a video that are decoded for each that is encoded: two of 24 a second."""
    _counts: dict[int, list[RowCounts]] = field(default_factory=dict)
    _costs: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    _imbalance: dict[tuple[int, int], float] = field(default_factory=dict)
    _rates: dict[Phase, Rates] = field(default_factory=dict)

    def counts(self, context: int) -> list[RowCounts]:
        """Return the counts of all rows on one of so many context ranks, by phase."""
        if context not in self._counts:
            degrees = replace(self.run.parallel.decoder, context=context, expert=1, tensor=1)
            parallel = replace(self.run.parallel, decoder=degrees)
            split = replace(self.run, parallel=parallel)
            self._counts[context] = count_rows(self.rows, split, context=0)
        return self._counts[context]

    def imbalance(self, data: int, num_stages: int) -> float:
        """Return how much longer a step takes because its rows are unlike.

        Replicas wait for each other in every micro-batch, and stages for the longest of those that
        are on their way.

        Args:
            data: Replicas.
            num_stages: Stages of a pipeline that is not interleaved, else 1: an interleaved one
                has other passes to run meanwhile.
        """
        key = data, num_stages
        if key not in self._imbalance:
            costs = self._micro_batches(data)
            longest = costs.max(axis=1)
            width = min(num_stages, len(longest))
            on_their_way = np.lib.stride_tricks.sliding_window_view(longest, width).max(axis=1)
            self._imbalance[key] = float(on_their_way.mean() / costs.mean())
        return self._imbalance[key]

    def _micro_batches(self, data: int) -> NDArray[np.float64]:
        """Return the costs of rows in training's order, by micro-batch and replica."""
        if data not in self._costs:
            degrees = replace(self.run.parallel.decoder, data=data)
            run = replace(self.run, parallel=replace(self.run.parallel, decoder=degrees))
            order = balanced_order(self.rows, run)
            costs = np.array([self._cost(self.rows[place]) for place in order])
            self._costs[data] = costs.reshape(-1, data)
        return self._costs[data]

    @property
    def num_pictures(self) -> int:
        """Pictures of all rows."""
        return sum(len(row.patches) for row in self.rows)

    def rates(self, phase: Phase) -> Rates:
        """Return the rates at which documents of the rows of a phase run together."""
        if phase not in self._rates:
            rows = [r for r in self.rows if self.run.training.row_phase(r.longest_path) == phase]
            lengths = np.concatenate([np.add(row.lengths, row.num_earlier) for row in rows])
            self._rates[phase] = self._rates_of(lengths.astype(np.float64), phase)
        return self._rates[phase]

    def _rates_of(self, lengths: NDArray[np.float64], phase: Phase) -> Rates:
        if phase != "sparse":
            pairs = lengths * (lengths + 1) / 2
            dense = DENSE_FORWARD, DENSE_BACKWARD, DENSE_LOSS
            return Rates(*(effective(curve, lengths, pairs) for curve in dense))
        top_k = self.run.model.decoder.indexer.top_k
        short = np.minimum(lengths, top_k)
        pairs = short * (short + 1) / 2 + (lengths - short) * short
        scale = _RELEASED_TOP_K / top_k
        unions = UNION_KEYS.at(lengths * scale)
        if self.union_keys:
            unions = np.full(len(lengths), self.union_keys * scale)
        curves = SELECTED_FORWARD, SELECTED_BACKWARD, SELECTED_LOSS
        return Rates(*(effective(curve, unions, pairs) for curve in curves))

    def _cost(self, row: RowSizes) -> float:
        layer, _ = row_works(self.run, row)
        return sum(work.executed_flops.forward for work in layer)
