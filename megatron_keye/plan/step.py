# SPDX-License-Identifier: Apache-2.0
"""The plan of one step: which vision rank encodes which pictures, and who gets which features.

Every rank computes it from sizes that are known before any pixel is decoded, so that both ends of
each message agree on its length without communication.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.plan.balance import cut_frames, lpt_assign
from megatron_keye.plan.cost import VisionCost
from megatron_keye.plan.order import Exchange, transport_order
from megatron_keye.plan.places import (
    encoded_together,
    encoding_ranks,
    first_stage_rank,
    owned_positions,
    vision_ranks,
)


@dataclass(frozen=True)
class PictureSlot:
    """One picture of the step: its position in the global batch and its size."""

    row: int
    """Index of its row in the global batch."""
    index: int
    """Index of the picture within its row."""
    start: int
    """Row position of its first placeholder."""
    num_patches: int
    """Patches P of the picture."""
    num_tokens: int
    """Merged tokens M that it becomes."""


@dataclass(frozen=True)
class Chunk:
    """Pictures that one vision rank encodes at once."""

    vision_rank: int
    """The rank that encodes it."""
    pictures: tuple[PictureSlot, ...]
    """Its pictures, in the order in which the decoder needs them."""

    @property
    def num_patches(self) -> int:
        """Patches of all its pictures."""
        return sum(picture.num_patches for picture in self.pictures)

    @property
    def num_tokens(self) -> int:
        """Merged tokens M of all its pictures."""
        return sum(picture.num_tokens for picture in self.pictures)


@dataclass(frozen=True)
class Transfer:
    """Features of one chunk that one decoder rank needs for one micro-batch."""

    tag: int
    """Index of the transfer within the step."""
    chunk: int
    """Index of the chunk in the plan."""
    source: int
    """Vision rank that sends it."""
    destination: int
    """First-stage decoder rank that receives it, and returns its gradient."""
    micro_batch: int
    """Micro-batch of the destination."""
    feature_rows: NDArray[np.int64]
    """Rows of the chunk's features [M, D] that are sent."""
    positions: NDArray[np.int64]
    """Where they go in the destination's S/CP/TP embeddings, in the same order."""


@dataclass(frozen=True)
class StepPlan:
    """All chunks, transfers and exchanges of one step."""

    chunks: tuple[Chunk, ...]
    """In the order in which the decoder needs them."""
    transfers: tuple[Transfer, ...]
    """By chunk, row and destination; a transfer's tag is its index."""
    exchanges: tuple[Exchange, ...]
    """All-to-alls that carry them, in the order in which every rank starts those it is part of."""
    num_micro_batches: int
    """Micro-batches of a replica."""

    def chunks_of(self, vision_rank: int) -> list[int]:
        """Return the indices of the chunks that a vision rank encodes."""
        return [i for i, chunk in enumerate(self.chunks) if chunk.vision_rank == vision_rank]

    def transfers_of(self, chunk: int) -> list[Transfer]:
        """Return the transfers of a chunk's features."""
        return self._by_chunk.get(chunk, [])

    def sends(self, source: int, micro_batch: int) -> list[Transfer]:
        """Return the transfers that a vision rank sends for a micro-batch."""
        return self._by_source.get((source, micro_batch), [])

    def receives(self, destination: int, micro_batch: int) -> list[Transfer]:
        """Return the transfers that a decoder rank receives for a micro-batch."""
        return self._by_destination.get((destination, micro_batch), [])

    @cached_property
    def _by_chunk(self) -> dict[int, list[Transfer]]:
        return _grouped((t.chunk, t) for t in self.transfers)

    @cached_property
    def _by_source(self) -> dict[tuple[int, int], list[Transfer]]:
        return _grouped(((t.source, t.micro_batch), t) for t in self.transfers)

    @cached_property
    def _by_destination(self) -> dict[tuple[int, int], list[Transfer]]:
        return _grouped(((t.destination, t.micro_batch), t) for t in self.transfers)


def plan_step(
    pictures: Sequence[PictureSlot],
    *,
    num_rows: int,
    row_tokens: int,
    parallel: ParallelConfig,
    cost: VisionCost,
    returns_gradients: bool,
) -> StepPlan:
    """Plan one step.

    Args:
        pictures: All pictures of the global batch, rows ascending.
        num_rows: Rows of the global batch; row r is micro-batch r // data of replica r % data.
        row_tokens: Length S of a row.
        parallel: Degrees and the chunk limit.
        cost: Cost model of a frame.
        returns_gradients: Whether ViT or projector is trained.

    Returns:
        The same plan on every rank.
    """
    cuts, ranks = balanced_cuts(
        np.array([picture.row for picture in pictures], dtype=np.int64),
        np.array([picture.num_patches for picture in pictures], dtype=np.int64),
        num_rows=num_rows,
        parallel=parallel,
        cost=cost,
    )
    return plan_messages(
        [
            Chunk(vision_rank=rank, pictures=tuple(pictures[cut.start : cut.stop]))
            for cut, rank in zip(cuts, ranks, strict=True)
        ],
        num_rows=num_rows,
        row_tokens=row_tokens,
        parallel=parallel,
        returns_gradients=returns_gradients,
    )


def plan_messages(
    chunks: Sequence[Chunk],
    *,
    num_rows: int,
    row_tokens: int,
    parallel: ParallelConfig,
    returns_gradients: bool,
) -> StepPlan:
    """Plan transfers and exchanges for given chunks; other arguments as in `plan_step`."""
    owners = _RowOwners(row_tokens, parallel)
    transfers: list[Transfer] = []
    for number, chunk in enumerate(chunks):
        transfers += _transfers_of_chunk(number, chunk, owners, parallel, first_tag=len(transfers))
    num_micro_batches = num_rows // parallel.decoder.data
    exchanges = transport_order(
        parallel,
        num_micro_batches,
        {transfer.micro_batch for transfer in transfers},
        returns_gradients=returns_gradients,
    )
    return StepPlan(
        chunks=tuple(chunks),
        transfers=tuple(transfers),
        exchanges=tuple(exchanges),
        num_micro_batches=num_micro_batches,
    )


def balanced_cuts(
    rows: NDArray[np.int64],
    patches: NDArray[np.int64],
    *,
    num_rows: int,
    parallel: ParallelConfig,
    cost: VisionCost,
) -> tuple[list[range], list[int]]:
    """Cut pictures that are needed at the same time into chunks, and assign these to ranks.

    Vision ranks of their own work ahead of the decoder by micro-batches, so each micro-batch is
    spread over all of them. Where the decoder's ranks encode, they do so before they run it, and
    each part of the batch that is theirs is cut as a whole.

    Args:
        rows: Index of each picture's row in the global batch, ascending.
        patches: Patches of each picture.
        num_rows: Rows of the global batch.
        parallel: Degrees, placement and the chunk limit.
        cost: Cost model of a frame.

    Returns:
        Index ranges of the chunks' pictures, and the rank of each chunk.
    """
    data = parallel.decoder.data
    load = dict.fromkeys(vision_ranks(parallel), 0.0)
    costs = cost.of_frames(patches)
    cuts: list[range] = []
    ranks: list[int] = []
    for needed in encoded_together(parallel.vision, num_rows // data):
        first, last = np.searchsorted(rows, (needed.start * data, needed.stop * data)).tolist()
        sharing = encoding_ranks(parallel, needed.start, num_rows // data)
        part = cut_frames(
            patches[first:last],
            chunk_patches=parallel.vision.chunk_patches,
            num_ranks=len(sharing),
            cost=cost,
        )
        own_load = {rank: load[rank] for rank in sharing}
        starts = [cut.start for cut in part]
        sums = np.add.reduceat(costs[first:last], starts).tolist() if part else list[float]()
        ranks += lpt_assign(sums, own_load)
        load |= own_load
        cuts += [range(first + cut.start, first + cut.stop) for cut in part]
    return cuts, ranks


def _grouped[K](transfers: Iterable[tuple[K, Transfer]]) -> dict[K, list[Transfer]]:
    groups = defaultdict(list)
    for key, transfer in transfers:
        groups[key].append(transfer)
    return groups


class _RowOwners:
    """For each position of a row: which first-stage rank of replica 0 holds it, and where."""

    def __init__(self, row_tokens: int, parallel: ParallelConfig) -> None:
        degrees = parallel.decoder
        self.owner = np.empty(row_tokens, dtype=np.int64)
        self.local = np.empty(row_tokens, dtype=np.int64)
        for context in range(degrees.context):
            positions = owned_positions(row_tokens, degrees.context, context)
            for tensor, part in enumerate(np.split(positions, degrees.tensor)):
                self.owner[part] = first_stage_rank(
                    degrees, data=0, context=context, tensor=tensor
                )
                self.local[part] = np.arange(len(part))


def _transfers_of_chunk(
    number: int, chunk: Chunk, owners: _RowOwners, parallel: ParallelConfig, first_tag: int
) -> Iterator[Transfer]:
    """Yield the transfers of one chunk, by row and then by owner."""
    data = parallel.decoder.data
    tag = first_tag
    for row, feature_rows, positions in _feature_rows(chunk):
        first_of_replica = first_stage_rank(parallel.decoder, data=row % data, context=0, tensor=0)
        for owner in np.unique(owners.owner[positions]):
            is_mine = owners.owner[positions] == owner
            yield Transfer(
                tag=tag,
                chunk=number,
                source=chunk.vision_rank,
                destination=first_of_replica + int(owner),
                micro_batch=row // data,
                feature_rows=feature_rows[is_mine],
                positions=owners.local[positions[is_mine]],
            )
            tag += 1


def _feature_rows(chunk: Chunk) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield each row with pictures in a chunk, their feature rows, and their row positions."""
    offset = 0
    for row, group in groupby(chunk.pictures, key=lambda picture: picture.row):
        pictures = list(group)
        counts = np.array([picture.num_tokens for picture in pictures])
        starts = np.array([picture.start for picture in pictures])
        before = np.cumsum(counts) - counts
        indices = np.arange(counts.sum())
        yield row, offset + indices, indices + np.repeat(starts - before, counts)
        offset += len(indices)
