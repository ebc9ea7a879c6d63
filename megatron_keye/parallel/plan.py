"""The plan of one step: which vision rank encodes which pictures, and who gets which features.

Every rank computes it alone from sizes known before any pixel is decoded, so that no rank has to
ask another what to expect, and both ends of each message agree on its length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel.context import owned_positions
from megatron_keye.parallel.grid import Grid, decoder_place


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


@dataclass(frozen=True)
class Shipment:
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
    shipments: tuple[Shipment, ...]
    """In the order in which they are sent."""

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches in which anything is sent, ascending."""
        return sorted({shipment.micro_batch for shipment in self.shipments})

    def chunks_of(self, vision_rank: int) -> list[int]:
        """Return the indices of the chunks that a vision rank encodes."""
        return [i for i, chunk in enumerate(self.chunks) if chunk.vision_rank == vision_rank]

    def shipments_of(self, chunk: int) -> list[Shipment]:
        """Return what is sent when a chunk is encoded."""
        return [shipment for shipment in self.shipments if shipment.chunk == chunk]

    def arrivals(self, destination: int, micro_batch: int) -> list[Shipment]:
        """Return what a decoder rank waits for before it starts a micro-batch."""
        return [
            shipment
            for shipment in self.shipments
            if shipment.destination == destination and shipment.micro_batch == micro_batch
        ]


def plan_step(
    pictures: Sequence[PictureSlot], *, row_tokens: int, parallel: ParallelConfig, grid: Grid
) -> StepPlan:
    """Plan one step.

    Args:
        pictures: All pictures of the global batch, rows ascending.
        row_tokens: Length S of a row.
        parallel: Degrees and the chunk limit.
        grid: Tells which ranks encode.

    Returns:
        The same plan on every rank.
    """
    chunks = _assign(_cut(pictures, parallel, len(grid.vision_ranks)), grid.vision_ranks)
    owners = _RowOwners(row_tokens, parallel)
    shipments: list[Shipment] = []
    for number, chunk in enumerate(chunks):
        shipments += _ship(number, chunk, owners, parallel, first_tag=len(shipments))
    return StepPlan(chunks=tuple(chunks), shipments=tuple(shipments))


def _cut(
    pictures: Sequence[PictureSlot], parallel: ParallelConfig, num_ranks: int
) -> list[list[PictureSlot]]:
    """Fill chunks in order, up to the limit and to a fair share; no picture is split."""
    total = sum(picture.num_patches for picture in pictures)
    limit = min(parallel.vision.chunk_patches, -(-total // num_ranks))
    chunks: list[list[PictureSlot]] = []
    filled = limit
    for picture in pictures:
        if filled + picture.num_patches > limit:
            chunks.append([])
            filled = 0
        chunks[-1].append(picture)
        filled += picture.num_patches
    return chunks


def _assign(chunks: list[list[PictureSlot]], vision_ranks: Sequence[int]) -> list[Chunk]:
    """Give each chunk, in order, to the vision rank that has the fewest patches so far."""
    load = dict.fromkeys(vision_ranks, 0)
    assigned = []
    for pictures in chunks:
        rank = min(vision_ranks, key=lambda candidate: (load[candidate], candidate))
        chunk = Chunk(vision_rank=rank, pictures=tuple(pictures))
        load[rank] += chunk.num_patches
        assigned.append(chunk)
    return assigned


class _RowOwners:
    """For each position of a row: which first-stage rank of a replica holds it, and where."""

    def __init__(self, row_tokens: int, parallel: ParallelConfig) -> None:
        degrees = parallel.decoder
        self.owner = np.empty(row_tokens, dtype=np.int64)
        self.local = np.empty(row_tokens, dtype=np.int64)
        for context in range(degrees.context):
            positions = owned_positions(row_tokens, degrees.context, context).numpy()
            for tensor, part in enumerate(np.split(positions, degrees.tensor)):
                self.owner[part] = context * degrees.tensor + tensor
                self.local[part] = np.arange(len(part))


def _ship(
    number: int, chunk: Chunk, owners: _RowOwners, parallel: ParallelConfig, first_tag: int
) -> Iterator[Shipment]:
    """Yield the messages of one chunk, by row and then by owner."""
    data = parallel.decoder.data
    tag = first_tag
    for row, feature_rows, positions in _rows_of(chunk):
        for owner in np.unique(owners.owner[positions]):
            is_mine = owners.owner[positions] == owner
            yield Shipment(
                tag=tag,
                chunk=number,
                source=chunk.vision_rank,
                destination=_first_stage_rank(parallel, row % data, int(owner)),
                micro_batch=row // data,
                feature_rows=feature_rows[is_mine],
                positions=owners.local[positions[is_mine]],
            )
            tag += 1


def _rows_of(chunk: Chunk) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield each row that a chunk feeds, with its rows of features and their row positions."""
    offsets = np.cumsum([0, *(picture.num_tokens for picture in chunk.pictures)])
    for row in dict.fromkeys(picture.row for picture in chunk.pictures):
        feature_rows, positions = [], []
        for picture, offset in zip(chunk.pictures, offsets[:-1], strict=True):
            if picture.row == row:
                feature_rows.append(offset + np.arange(picture.num_tokens))
                positions.append(picture.start + np.arange(picture.num_tokens))
        yield row, np.concatenate(feature_rows), np.concatenate(positions)


def _first_stage_rank(parallel: ParallelConfig, data: int, owner: int) -> int:
    """Return the rank of the first stage that stands at `owner` (tensor fastest, then context)."""
    rank = data * parallel.decoder.context * parallel.decoder.tensor + owner
    assert decoder_place(parallel.decoder, rank).data == data, "ranks count tensor, context, data"
    return rank
