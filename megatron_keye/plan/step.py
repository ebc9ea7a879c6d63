"""The plan of one step: which vision rank encodes which pictures, and who gets which features.

Every rank computes it alone from sizes known before any pixel is decoded, so that no rank has to
ask another what to expect, and both ends of each message agree on its length.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.plan.balance import cut_frames, groups_by_need, lpt_assign
from megatron_keye.plan.cost import VisionCost
from megatron_keye.plan.order import Exchange, transport_order
from megatron_keye.plan.places import first_stage_rank, owned_positions, vision_ranks


@dataclass(frozen=True)
class PictureSlot:
    """One picture of the step: its place in the global batch and its size."""

    row: int
    """Global row, 0 to rows_per_step - 1."""
    index: int
    """Number of the picture within its row."""
    start: int
    """Row position of its first placeholder."""
    num_patches: int
    """Patches it is cut into."""
    num_tokens: int
    """Decoder tokens it becomes."""


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
    """Features of one chunk that one decoder rank owns for one micro-batch: one message."""

    tag: int
    """Number of the message within the step."""
    chunk: int
    """Index of the chunk in the plan."""
    source: int
    """Vision rank that sends it."""
    destination: int
    """First-stage decoder rank that takes it, and returns its gradient."""
    micro_batch: int
    """Micro-batch of the destination."""
    feature_rows: NDArray[np.int64]
    """Rows of the chunk's features that travel."""
    positions: NDArray[np.int64]
    """Where they go in the destination's S/CP/TP embeddings, in the same order."""


@dataclass(frozen=True)
class StepPlan:
    """All chunks and messages of one step."""

    chunks: tuple[Chunk, ...]
    """In the order in which the decoder needs them."""
    transfers: tuple[Transfer, ...]
    """By chunk, row and owner; a transfer's tag is its place."""
    exchanges: tuple[Exchange, ...]
    """What carries them, in the order in which every transport rank starts them."""

    def chunks_of(self, vision_rank: int) -> list[int]:
        """Return the indices of the chunks that a vision rank encodes."""
        return [i for i, chunk in enumerate(self.chunks) if chunk.vision_rank == vision_rank]

    def transfers_of(self, chunk: int) -> list[Transfer]:
        """Return what is sent when a chunk is encoded."""
        return self._by_chunk.get(chunk, [])

    def sends(self, source: int, micro_batch: int) -> list[Transfer]:
        """Return what a vision rank sends for a micro-batch."""
        return self._by_source.get((source, micro_batch), [])

    def receives(self, destination: int, micro_batch: int) -> list[Transfer]:
        """Return what a decoder rank waits for before it starts a micro-batch."""
        return self._by_destination.get((destination, micro_batch), [])

    @cached_property
    def _by_chunk(self) -> dict[int, list[Transfer]]:
        return _grouped((s.chunk, s) for s in self.transfers)

    @cached_property
    def _by_source(self) -> dict[tuple[int, int], list[Transfer]]:
        return _grouped(((s.source, s.micro_batch), s) for s in self.transfers)

    @cached_property
    def _by_destination(self) -> dict[tuple[int, int], list[Transfer]]:
        return _grouped(((s.destination, s.micro_batch), s) for s in self.transfers)


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
        cost: Of a frame.
        returns_gradients: Whether anything in front of the decoder learns.

    Returns:
        The same plan on every rank.
    """
    return plan_messages(
        list(balanced_chunks(pictures, parallel, cost)),
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
    """Plan what is sent, given who encodes what; the arguments are those of `plan_step`."""
    owners = _RowOwners(row_tokens, parallel)
    transfers: list[Transfer] = []
    for number, chunk in enumerate(chunks):
        transfers += _transfers_of_chunk(number, chunk, owners, parallel, first_tag=len(transfers))
    exchanges = transport_order(
        parallel,
        num_rows // parallel.decoder.data,
        {transfer.micro_batch for transfer in transfers},
        returns_gradients=returns_gradients,
    )
    return StepPlan(chunks=tuple(chunks), transfers=tuple(transfers), exchanges=tuple(exchanges))


def balanced_chunks(
    pictures: Sequence[PictureSlot], parallel: ParallelConfig, cost: VisionCost
) -> Iterator[Chunk]:
    """Cut and assign the pictures that are needed at the same time, group after group.

    Vision ranks of their own work a micro-batch ahead of the decoder, so each micro-batch is
    spread over all of them. Colocated, nothing is decoded before all is encoded.
    """
    is_dedicated = parallel.vision.placement == "dedicated"
    need = [p.row // parallel.decoder.data if is_dedicated else 0 for p in pictures]
    load = dict.fromkeys(vision_ranks(parallel), 0.0)
    for _, group in groups_by_need(need):
        frames = [pictures[place].num_patches for place in group]
        cuts = cut_frames(
            frames, chunk_patches=parallel.vision.chunk_patches, num_ranks=len(load), cost=cost
        )
        costs = [sum(cost.of_frame(frames[frame]) for frame in cut) for cut in cuts]
        owners = lpt_assign(costs, load)
        for rank, cut in zip(owners, cuts, strict=True):
            held = pictures[group.start + cut.start : group.start + cut.stop]
            yield Chunk(vision_rank=rank, pictures=tuple(held))


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
    """Yield the messages of one chunk, by row and then by owner."""
    data = parallel.decoder.data
    tag = first_tag
    for row, feature_rows, positions in _rows_of(chunk):
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


def _rows_of(chunk: Chunk) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield each row that a chunk feeds, with its rows of features and their row positions."""
    offset = 0
    for row, group in groupby(chunk.pictures, key=lambda picture: picture.row):
        pictures = list(group)
        counts = np.array([picture.num_tokens for picture in pictures])
        starts = np.array([picture.start for picture in pictures])
        before = np.cumsum(counts) - counts
        places = np.arange(counts.sum())
        yield row, offset + places, places + np.repeat(starts - before, counts)
        offset += len(places)
