# SPDX-License-Identifier: Apache-2.0
"""What a layer's work is proportional to: tokens, pairs, keys and labels of rows.

A context rank's part of a document is a branch of it: its tokens, with those before them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.plan.cost import num_pairs
from megatron_keye.plan.slots import RowSizes

RECALL_QUERIES = 16
"""Queries of a row and rank whose dense scores measure the selection (decoder/recall.py)."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Tokens, and pairs of a query and a key."""

    num_tokens: float
    """Tokens."""
    attended: float
    """Pairs that attention weighs: selected ones in the sparse phase, else all."""
    scored: float
    """Pairs that the indexer scores: all that a query sees."""

    def __add__(self, other: "Extent") -> "Extent":
        """Return the sum."""
        return Extent(
            num_tokens=self.num_tokens + other.num_tokens,
            attended=self.attended + other.attended,
            scored=self.scored + other.scored,
        )


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of rows of one phase, whole or one context rank's parts of them."""

    phase: Phase
    """What a layer does with them."""
    num_rows: int
    """Rows; each is a pass of its own, which reads the weights once."""
    real: Extent
    """Without padding."""
    laid: Extent
    """With padding, a document of its own."""
    num_keys: float
    """Keys that some of these tokens see. Where a document branches, those of a branch beside
    count too if they lie before the last of these tokens."""
    num_labels: float
    """Tokens that have a label."""
    num_measured: float
    """Pairs of a query whose recall is measured and a key of the row, which are float32."""

    def __add__(self, other: "RowCounts") -> "RowCounts":
        """Return the counts of both together."""
        assert self.phase == other.phase, "rows of two phases do different work"
        return replace(
            self,
            num_rows=self.num_rows + other.num_rows,
            real=self.real + other.real,
            laid=self.laid + other.laid,
            num_keys=self.num_keys + other.num_keys,
            num_labels=self.num_labels + other.num_labels,
            num_measured=self.num_measured + other.num_measured,
        )


def count_rows(
    rows: Iterable[RowSizes], run: RunConfig, *, context: int | None = None
) -> list[RowCounts]:
    """Return the counts of rows, one for each phase among them.

    Args:
        rows: Sizes of rows.
        run: Sizes, phase and degrees.
        context: Rank along the context axis, whose parts are counted; None for whole rows.
    """
    counts: dict[Phase, RowCounts] = {}
    for row in rows:
        of_row = _count_row(row, run, context)
        known = counts.get(of_row.phase)
        counts[of_row.phase] = known + of_row if known else of_row
    return list(counts.values())


def _count_row(row: RowSizes, run: RunConfig, context: int | None) -> RowCounts:
    phase = run.training.row_phase(row.longest_path)
    top_k = run.model.decoder.indexer.top_k if phase == "sparse" else None
    lengths = np.asarray(row.lengths, dtype=np.int64)
    row_tokens, num_ranks = int(lengths.sum()), 1
    ranges = [(0, row_tokens)]
    if context is not None:
        num_ranks = run.parallel.decoder.context
        ranges = _owned_ranges(row_tokens, num_ranks, context)
    num_tokens = row_tokens // num_ranks
    num_sampled = num_tokens // max(1, num_tokens // RECALL_QUERIES)
    return RowCounts(
        phase=phase,
        num_rows=1,
        real=_extent(row, ranges, row_tokens - row.num_padding, top_k),
        laid=_extent(row, ranges, row_tokens, top_k),
        num_keys=_num_keys(row, ranges),
        num_labels=row.num_labels / num_ranks,
        num_measured=num_sampled * row_tokens if phase == "sparse" else 0,
    )


def _owned_ranges(row_tokens: int, num_ranks: int, rank: int) -> list[tuple[int, int]]:
    """Return the two ranges that `plan.places.owned_positions` lists."""
    size = row_tokens // (2 * num_ranks)
    parts = (rank, 2 * num_ranks - 1 - rank)
    return [(part * size, (part + 1) * size) for part in parts]


def _extent(
    row: RowSizes, ranges: Sequence[tuple[int, int]], end: int, top_k: int | None
) -> Extent:
    """Return what the tokens of some ranges do, as far as they lie before `end`."""
    extent = Extent(num_tokens=0, attended=0, scored=0)
    for first, last in ranges:
        _, lengths, earlier = _branches(row, first, min(last, end))
        scored = num_pairs(lengths, None, earlier)
        extent += Extent(
            num_tokens=float(lengths.sum()),
            attended=scored if top_k is None else num_pairs(lengths, top_k, earlier),
            scored=scored,
        )
    return extent


def _branches(
    row: RowSizes, first: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return index, tokens and tokens before them on their path, of each branch in a range."""
    lengths = np.asarray(row.lengths, dtype=np.int64)
    ends = lengths.cumsum()
    starts = ends - lengths
    earlier = np.broadcast_to(np.asarray(row.num_earlier, dtype=np.int64), lengths.shape)
    low, high = np.maximum(starts, first), np.minimum(ends, last)
    (inside,) = (high > low).nonzero()
    return inside, (high - low)[inside], (earlier + low - starts)[inside]


def _num_keys(row: RowSizes, ranges: Sequence[tuple[int, int]]) -> float:
    """Return the tokens of each document up to the last one that lies in a range."""
    lengths = np.asarray(row.lengths, dtype=np.int64)
    ends = lengths.cumsum()
    starts = ends - lengths
    begins = np.broadcast_to(np.asarray(row.num_earlier) == 0, lengths.shape)
    document = begins.cumsum() - 1
    document_start = starts[begins]
    furthest = document_start.copy()
    for first, last in ranges:
        inside, _, _ = _branches(row, first, last)
        np.maximum.at(furthest, document[inside], np.minimum(ends[inside], last))
    return float((furthest - document_start).sum())
