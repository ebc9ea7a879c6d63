"""Coordinates of the ranks in their grids, and the tokens of a row that each rank holds.

Decoder ranks come first, numbered with tensor fastest, then context, data, pipeline; dedicated
vision ranks follow. Launchers assign these numbers; `parallel/grid.py` makes the process groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig


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
    num_decoder = parallel.decoder.num_ranks
    if parallel.vision.placement == "dedicated":
        return range(num_decoder, num_decoder + parallel.vision.num_ranks)
    return range(num_decoder)


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
