# SPDX-License-Identifier: Apache-2.0
"""The work of a step as arrays: sizes of rows, and chunks with the ranks that encode them.

Training plans every token that travels; a simulation of thousands of ranks needs only counts. Both
cut and assign chunks by the same function (`plan/step.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.run import RunConfig
from megatron_keye.data.placeholders import picture_slots
from megatron_keye.data.row import PackedRow
from megatron_keye.plan.balance import cut_at
from megatron_keye.plan.cost import vision_cost
from megatron_keye.plan.order import Exchange, transport_order
from megatron_keye.plan.places import vision_ranks
from megatron_keye.plan.slots import RowSizes, balanced_order, vision_learns
from megatron_keye.plan.step import StepPlan, balanced_cuts

Integers = NDArray[np.int64]


class PictureSizes(NamedTuple):
    """Pictures of one row, ascending."""

    starts: Integers
    """Row position of each one's first placeholder."""
    patches: Integers
    """Patches P of each."""
    tokens: Integers
    """Merged tokens M that each becomes."""


NO_PICTURES = PictureSizes(*np.empty((3, 0), dtype=np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class RowShape:
    """Sizes of one packed row."""

    document_lengths: tuple[int, ...]
    """Tokens of each document, padding included; of each branch where documents branch."""
    pictures: PictureSizes = NO_PICTURES
    """Its pictures."""
    num_earlier: tuple[int, ...] = (0,)
    """Tokens before each branch on its path; 0 for all by default."""
    num_padding: int = 0
    """Tokens of the row that are padding, at its end and in its last document."""
    num_labels: int = 0
    """Tokens that have a label."""

    @property
    def sizes(self) -> RowSizes:
        """What its cost follows from."""
        return RowSizes(
            self.document_lengths,
            self.pictures.patches,
            self.num_earlier,
            self.num_padding,
            self.num_labels,
        )


def shape_of(row: PackedRow, run: RunConfig) -> RowShape:
    """Return the sizes of a row.

    Raises:
        UserError: If its placeholders are not where its pictures go.
    """
    sizes, slots = row.sizes, picture_slots([row], run)
    columns = np.array([(s.start, s.num_patches, s.num_tokens) for s in slots], dtype=np.int64)
    return RowShape(
        document_lengths=tuple(np.asarray(sizes.lengths).tolist()),
        pictures=PictureSizes(*columns.reshape(-1, 3).T),
        num_earlier=tuple(np.asarray(sizes.num_earlier).tolist()),
        num_padding=sizes.num_padding,
        num_labels=sizes.num_labels,
    )


def balance_shapes(rows: Sequence[RowShape], run: RunConfig) -> list[RowShape]:
    """Return the rows in training's order."""
    return [rows[place] for place in balanced_order([row.sizes for row in rows], run)]


class BatchPictures(NamedTuple):
    """Pictures of a global batch, rows ascending."""

    rows: Integers
    """Index of each one's row in the global batch."""
    starts: Integers
    """As `PictureSizes`."""
    patches: Integers
    """As `PictureSizes`."""
    tokens: Integers
    """As `PictureSizes`."""

    @classmethod
    def of_rows(cls, rows: Sequence[RowShape]) -> "BatchPictures":
        """Join the pictures of all rows of a global batch."""
        counts = [len(row.pictures.patches) for row in rows]
        numbers = np.repeat(np.arange(len(rows)), counts)
        columns = zip(*(row.pictures for row in rows), strict=True)
        return cls(numbers, *(np.concatenate(column) for column in columns))


@dataclass(frozen=True, kw_only=True, eq=False)
class StepWork:
    """Chunks and exchanges of one step."""

    num_micro_batches: int
    """Micro-batches of a replica."""
    exchanges: tuple[Exchange, ...]
    """In the order of the plan."""
    ranks: Integers
    """Vision rank of each chunk, in the order in which the decoder needs chunks."""
    num_pictures: Integers
    """Pictures of each chunk; chunks follow each other in the batch's order."""
    first_micro_batch: Integers
    """First micro-batch that needs each chunk."""
    last_micro_batch: Integers
    """Last micro-batch that needs each chunk."""
    has_pictures: NDArray[np.bool_]
    """Whether a replica has pictures in a micro-batch: [micro-batches, replicas]."""

    @property
    def chunk_of_picture(self) -> Integers:
        """Index of each picture's chunk."""
        return np.repeat(np.arange(len(self.ranks)), self.num_pictures)


def work_of(plan: StepPlan, num_replicas: int) -> StepWork:
    """Return the work of training's plan of a step."""
    rows = [[picture.row for picture in chunk.pictures] for chunk in plan.chunks]
    return _work(
        np.array([row for own in rows for row in own], dtype=np.int64),
        np.array([len(own) for own in rows], dtype=np.int64),
        [chunk.vision_rank for chunk in plan.chunks],
        plan.exchanges,
        plan.num_micro_batches,
        num_replicas,
    )


def plan_balanced(rows: Sequence[RowShape], run: RunConfig) -> StepWork:
    """Return the work that training plans for rows in this order."""
    pictures = BatchPictures.of_rows(rows)
    cuts, ranks = balanced_cuts(
        pictures.rows,
        pictures.patches,
        num_rows=len(rows),
        parallel=run.parallel,
        cost=vision_cost(run.model.vision, run.parallel.vision),
    )
    return _planned(pictures, cuts, ranks, len(rows), run)


def plan_dealt(
    rows: Sequence[RowShape], run: RunConfig, *, deal: Literal["documents", "counts"]
) -> StepWork:
    """Return work that is dealt out without regard to costs, as a baseline.

    Args:
        rows: In the order in which the decoder runs them.
        run: Sizes and degrees.
        deal: "documents": whole documents round-robin, as data parallelism over samples does.
            "counts": the same number of consecutive pictures for each rank.
    """
    pictures, encoding = BatchPictures.of_rows(rows), vision_ranks(run.parallel)
    if deal == "documents":
        shares = np.unique(_documents(rows, pictures), return_inverse=True)[1]
    else:
        shares = np.arange(len(pictures.rows)) * len(encoding) // max(1, len(pictures.rows))
    cuts = cut_at(shares, pictures.patches, run.parallel.vision.chunk_patches)
    ranks = [encoding[int(shares[cut.start]) % len(encoding)] for cut in cuts]
    return _planned(pictures, cuts, ranks, len(rows), run)


def _documents(rows: Sequence[RowShape], pictures: BatchPictures) -> Integers:
    """Return a number for each picture that grows from document to document."""
    row_tokens = sum(rows[0].document_lengths)
    lengths = np.concatenate([row.document_lengths for row in rows])
    positions = pictures.rows * row_tokens + pictures.starts
    return np.searchsorted(np.cumsum(lengths), positions, side="right")


def _planned(
    pictures: BatchPictures, cuts: list[range], ranks: list[int], num_rows: int, run: RunConfig
) -> StepWork:
    data = run.parallel.decoder.data
    exchanges = transport_order(
        run.parallel,
        num_rows // data,
        set(np.unique(pictures.rows // data).tolist()),
        returns_gradients=vision_learns(run),
    )
    sizes = np.array([len(cut) for cut in cuts], dtype=np.int64)
    return _work(pictures.rows, sizes, ranks, exchanges, num_rows // data, data)


def _work(
    rows: Integers,
    sizes: Integers,
    ranks: list[int],
    exchanges: Sequence[Exchange],
    num_micro_batches: int,
    num_replicas: int,
) -> StepWork:
    ends = np.cumsum(sizes)
    has_pictures = np.zeros((num_micro_batches, num_replicas), dtype=np.bool_)
    has_pictures.reshape(-1)[rows] = True
    return StepWork(
        num_micro_batches=num_micro_batches,
        exchanges=tuple(exchanges),
        ranks=np.array(ranks, dtype=np.int64),
        num_pictures=sizes,
        first_micro_batch=rows[ends - sizes] // num_replicas,
        last_micro_batch=rows[ends - 1] // num_replicas,
        has_pictures=has_pictures,
    )
