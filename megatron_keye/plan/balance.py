# SPDX-License-Identifier: Apache-2.0
"""Balances a step's work: pictures over vision ranks, rows over replicas.

Pure functions of sizes, so that every rank gets the same result without communication.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.plan.cost import VisionCost


@dataclass(frozen=True)
class RowCost:
    """Cost of one packed row. Rows have equal lengths, so the decoder's differs in attention."""

    attention: float
    """Cost of its attention, in any unit."""
    vision: float
    """Cost of its pictures, in any unit."""


def order_rows(
    costs: Sequence[RowCost], num_replicas: int, *, few_pictures_at_ends: bool
) -> list[int]:
    """Assign rows to micro-batches and replicas.

    Each micro-batch holds rows of similar attention cost, since replicas that exchange features
    wait for each other in it; within it, the least loaded replica gets the most expensive row.
    Micro-batches of similar cost follow each other, since stages of a pipeline wait for those of
    their neighbours that run at the same time.

    Args:
        costs: Cost of each row of the global batch.
        num_replicas: Data-parallel replicas; divides the number of rows.
        few_pictures_at_ends: Whether micro-batches with few pictures come first and last instead:
            the decoder starts early, and little vision work is left when it has finished.

    Returns:
        The rows in their new order: index i is micro-batch i // num_replicas of replica
        i % num_replicas.
    """
    most_expensive_first = sorted(range(len(costs)), key=lambda row: (-costs[row].attention, row))
    load = [0.0] * num_replicas
    micro_batches = []
    for first in range(0, len(costs), num_replicas):
        group = most_expensive_first[first : first + num_replicas]
        least_loaded_first = sorted(
            range(num_replicas), key=lambda replica: (load[replica], replica)
        )
        rows = [0] * num_replicas
        for row, replica in zip(group, least_loaded_first, strict=True):
            rows[replica] = row
            load[replica] += costs[row].attention
        micro_batches.append(rows)
    if not few_pictures_at_ends:
        return [row for rows in micro_batches for row in rows]
    # The sort is stable: ties keep their order by attention cost.
    micro_batches.sort(key=lambda rows: sum(costs[row].vision for row in rows))
    most_pictures_in_the_middle = micro_batches[::2] + micro_batches[1::2][::-1]
    return [row for rows in most_pictures_in_the_middle for row in rows]


def cut_frames(
    frames: Sequence[int] | NDArray[np.int64],
    *,
    chunk_patches: int,
    num_ranks: int,
    cost: VisionCost,
) -> list[range]:
    """Cut frames into chunks of about equal cost, a multiple of num_ranks where sizes allow.

    Args:
        frames: Patches of each frame, in the order in which they are needed; none is split.
        chunk_patches: Most patches of a chunk of more than one frame.
        num_ranks: Ranks that share the chunks.
        cost: Cost model of a frame.

    Returns:
        Index ranges that cover all frames in order, one for each chunk.
    """
    patches = np.asarray(frames, dtype=np.int64)
    if not len(patches):
        return []
    rounds = -(-int(patches.sum()) // (chunk_patches * num_ranks))
    costs = cost.of_frames(patches)
    cost_after = np.cumsum(costs)
    target = cost_after[-1] / (rounds * num_ranks)
    # Of the equal shares of cost, a frame belongs to the one that holds its midpoint.
    shares = ((cost_after - costs / 2) / target).astype(np.int64)
    return cut_at(shares, patches, chunk_patches)


def cut_at(
    shares: NDArray[np.int64], patches: NDArray[np.int64], chunk_patches: int
) -> list[range]:
    """Cut frames where their share changes, and where a chunk would become too large.

    Args:
        shares: Number of each frame's share, ascending.
        patches: Patches of each frame.
        chunk_patches: Most patches of a chunk of more than one frame.

    Returns:
        Index ranges that cover all frames in order, one for each chunk.
    """
    ends = [*(np.flatnonzero(np.diff(shares)) + 1).tolist(), len(patches)]
    size_after = np.cumsum(patches).tolist()
    cuts: list[range] = []
    start = 0
    for end in ends:
        while start < end:
            before = size_after[start] - int(patches[start])
            fitting = bisect_right(size_after, before + chunk_patches, lo=start, hi=end)
            cuts.append(range(start, max(start + 1, fitting)))
            start = cuts[-1].stop
    return cuts


def lpt_assign(costs: Sequence[float], load: dict[int, float]) -> list[int]:
    """Assign each chunk, the most expensive first, to the least loaded rank.

    Args:
        costs: Cost of each chunk.
        load: Cost assigned to each rank so far; updated in place.

    Returns:
        The rank of each chunk.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969): longest processing time
    first, at most 4/3 of the best makespan from an empty load.
    """
    owners = [0] * len(costs)
    least_loaded = [(assigned, rank) for rank, assigned in load.items()]
    heapq.heapify(least_loaded)
    for chunk in sorted(range(len(costs)), key=lambda c: (-costs[c], c)):
        assigned, rank = least_loaded[0]
        owners[chunk] = rank
        load[rank] = assigned + costs[chunk]
        heapq.heapreplace(least_loaded, (load[rank], rank))
    return owners
