# SPDX-License-Identifier: Apache-2.0
"""Coordinates of the ranks in their grids, and the tokens of a row that each rank holds.

Decoder ranks come first, numbered with tensor fastest, then context, data, pipeline; dedicated
vision ranks follow. Launchers assign these numbers; `parallel/grid.py` makes the process groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig, VisionParallel


@dataclass(frozen=True)
class DecoderPlace:
    """Coordinates of one rank in the decoder grid."""

    tensor: int
    """Rank along the tensor axis, along which sequence parallelism also splits the tokens."""
    context: int
    """Rank along the context axis."""
    data: int
    """Data-parallel replica, which decides the rows that the rank gets."""
    pipeline: int
    """Pipeline stage."""
    expert: int
    """Rank along the expert axis, which spans tensor, context and data together."""


def decoder_place(degrees: DecoderParallel, rank: int) -> DecoderPlace:
    """Return the coordinates of a decoder rank."""
    assert 0 <= rank < degrees.num_ranks, f"got rank {rank}, expected 0 to {degrees.num_ranks - 1}"
    pipeline, within_stage = divmod(rank, degrees.num_ranks // degrees.pipeline)
    rest, tensor = divmod(within_stage, degrees.tensor)
    data, context = divmod(rest, degrees.context)
    return DecoderPlace(
        tensor=tensor,
        context=context,
        data=data,
        pipeline=pipeline,
        expert=within_stage % degrees.expert,
    )


def role_of(parallel: ParallelConfig, rank: int) -> str:
    """Return the place of a rank in the grids in words; axes of one rank are left out.

    Args:
        parallel: Degrees and placement.
        rank: Global rank.
    """
    if rank >= parallel.decoder.num_ranks:
        return f"vision {rank - parallel.decoder.num_ranks} of {parallel.vision.num_ranks}"
    place = decoder_place(parallel.decoder, rank)
    axes = [
        f"{axis} {getattr(place, axis)}"
        for axis in ("data", "context", "tensor", "expert")
        if getattr(parallel.decoder, axis) > 1
    ]
    return ", ".join([peers_of(parallel, rank), *axes])


def peers_of(parallel: ParallelConfig, rank: int) -> str:
    """Return the name of those ranks that have equal work with a rank.

    Args:
        parallel: Degrees and placement.
        rank: Global rank.
    """
    if rank >= parallel.decoder.num_ranks:
        return "vision"
    return f"decoder stage {decoder_place(parallel.decoder, rank).pipeline}"


def first_stage_ranks(degrees: DecoderParallel) -> range:
    """Return the ranks of the first pipeline stage, which hold the embeddings."""
    return range(degrees.num_ranks // degrees.pipeline)


def first_stage_rank(degrees: DecoderParallel, *, data: int, context: int, tensor: int) -> int:
    """Return the rank of the first pipeline stage at these coordinates."""
    return (data * degrees.context + context) * degrees.tensor + tensor


def vision_ranks(parallel: ParallelConfig) -> range:
    """Return the ranks that encode."""
    if parallel.vision.decoder_encodes:
        return range(parallel.num_ranks)
    return range(parallel.decoder.num_ranks, parallel.num_ranks)


def encoded_together(vision: VisionParallel, num_micro_batches: int) -> list[range]:
    """Return the micro-batches whose pictures are cut and encoded together, as ranges in order.

    Args:
        vision: The placement.
        num_micro_batches: Micro-batches of a replica.
    """
    if vision.placement == "colocated":
        return [range(num_micro_batches)]
    shared = min(vision.shared_micro_batches, num_micro_batches // 2)
    middle = [range(m, m + 1) for m in range(shared, num_micro_batches - shared)]
    if shared == 0:
        return middle
    return [range(shared), *middle, range(num_micro_batches - shared, num_micro_batches)]


def is_encoded_by_decoder(
    vision: VisionParallel, micro_batch: int, num_micro_batches: int
) -> bool:
    """Return whether the decoder's ranks encode a micro-batch, around their own work.

    Args:
        vision: The placement.
        micro_batch: Its index within a replica.
        num_micro_batches: Micro-batches of a replica.
    """
    from_an_end = min(micro_batch, num_micro_batches - 1 - micro_batch)
    return vision.placement == "colocated" or (
        from_an_end < min(vision.shared_micro_batches, num_micro_batches // 2)
    )


def encoding_ranks(parallel: ParallelConfig, micro_batch: int, num_micro_batches: int) -> range:
    """Return the ranks that share the pictures of a micro-batch."""
    num_decoder = parallel.decoder.num_ranks
    if is_encoded_by_decoder(parallel.vision, micro_batch, num_micro_batches):
        return range(num_decoder)
    return range(num_decoder, parallel.num_ranks)


def exchange_ranks(parallel: ParallelConfig, *, encoded_by_decoder: bool) -> list[int]:
    """Return the ranks of an exchange, ascending: those that encode, and the first stage.

    Args:
        parallel: Degrees and placement.
        encoded_by_decoder: Whether the decoder's ranks encode the micro-batch.
    """
    num_decoder = parallel.decoder.num_ranks
    if encoded_by_decoder:
        return list(range(num_decoder))
    return [*first_stage_ranks(parallel.decoder), *range(num_decoder, parallel.num_ranks)]


def transport_ranks(parallel: ParallelConfig) -> list[int]:
    """Return the ranks that exchange features: vision ranks and the first stage, ascending."""
    return sorted({*vision_ranks(parallel), *first_stage_ranks(parallel.decoder)})


def owned_positions(row_tokens: int, num_ranks: int, rank: int) -> NDArray[np.int64]:
    """Return the row positions that a context-parallel rank holds.

    The row is cut into 2 x CP equal parts and rank i holds parts i and 2 x CP - 1 - i, so that all
    ranks have the same number of (query, key) pairs under a causal mask. Where a document branches
    later queries see less: the busiest rank then has up to 1.3 times the mean, 1.01 times with a
    prompt of 128K and eight answers of 2K.

    Args:
        row_tokens: Length S of the row, a multiple of 2 x num_ranks unless num_ranks is 1.
        num_ranks: Size CP of the context axis.
        rank: Rank along it.

    Returns:
        int64 [S/CP], ascending.

    Source: the zigzag split of causal ring attention, as Megatron-Core's context parallelism has
    it for whole sequences.
    """
    if num_ranks == 1:
        return np.arange(row_tokens)
    parts = np.arange(row_tokens).reshape(2 * num_ranks, -1)
    return np.concatenate([parts[rank], parts[2 * num_ranks - 1 - rank]])
