"""Balances a step's work: pictures over vision ranks, rows over replicas.

Pure functions of sizes, so that every rank has the same result without a message.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_keye.plan.cost import VisionCost


@dataclass(frozen=True)
class RowCost:
    """What one packed row costs. All rows have the same length, so the decoder's share differs
    only in attention."""

    attention: float
    """Cost of its attention, in any unit."""
    vision: float
    """Cost of its pictures, in any unit."""


def order_rows(costs: Sequence[RowCost], num_replicas: int) -> list[int]:
    """Decide which row is which micro-batch of which replica.

    Replicas wait for each other in every micro-batch (they exchange features together), so each
    micro-batch takes rows of similar attention cost; within it, the least loaded replica takes the
    most expensive row. Micro-batches with few pictures come first and last: the decoder starts
    while vision ranks still encode the others, and little is left to do when it has ended.

    Args:
        costs: Of each row of the global batch.
        num_replicas: Divides the number of rows.

    Returns:
        The rows in their new order: place p is micro-batch p // num_replicas of replica
        p % num_replicas.
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
    # A stable sort: equal micro-batches keep the order that cost gave them.
    micro_batches.sort(key=lambda rows: sum(costs[row].vision for row in rows))
    mountain = micro_batches[::2] + micro_batches[1::2][::-1]
    return [row for rows in mountain for row in rows]


def cut_frames(
    frames: Sequence[int], *, chunk_patches: int, num_ranks: int, cost: VisionCost
) -> list[range]:
    """Cut frames into chunks of about equal cost, as many for each rank as the limit asks for.

    Args:
        frames: Patches of each frame, in the order of need; none is split.
        chunk_patches: Most patches of a chunk of more than one frame.
        num_ranks: Ranks that share the chunks.
        cost: Of a frame.

    Returns:
        Runs of frames, in order, together all of them.
    """
    if not frames:
        return []
    rounds = -(-sum(frames) // (chunk_patches * num_ranks))
    target = sum(map(cost.of_frame, frames)) / (rounds * num_ranks)
    starts, held, part, passed = [0], 0, 0, 0.0
    for index, num_patches in enumerate(frames):
        # The middle of a frame tells in which of the equal parts it lies.
        middle = int((passed + cost.of_frame(num_patches) / 2) / target)
        if index > 0 and (middle > part or held + num_patches > chunk_patches):
            starts.append(index)
            held = 0
        part = middle
        held += num_patches
        passed += cost.of_frame(num_patches)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(frames)], strict=True)]


def lpt_assign(costs: Sequence[float], load: dict[int, float]) -> list[int]:
    """Give each chunk, the most expensive first, to the rank that has least to do so far.

    Args:
        costs: Of the chunks that are needed at the same time.
        load: What each rank has already; the chunks' costs are added to it.

    Returns:
        The rank of each chunk.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969): longest processing time
    first, at most 4/3 of the best makespan from an empty load.
    """
    owners = [0] * len(costs)
    least_loaded = [(held, rank) for rank, held in load.items()]
    heapq.heapify(least_loaded)
    for chunk in sorted(range(len(costs)), key=lambda c: (-costs[c], c)):
        held, rank = least_loaded[0]
        owners[chunk] = rank
        load[rank] = held + costs[chunk]
        heapq.heapreplace(least_loaded, (load[rank], rank))
    return owners


def groups_by_need[T](needed_in: Sequence[T]) -> Iterator[tuple[T, range]]:
    """Yield each run of equal neighbours as its value and its places."""
    start = 0
    for place in range(1, len(needed_in) + 1):
        if place == len(needed_in) or needed_in[place] != needed_in[start]:
            yield needed_in[start], range(start, place)
            start = place
