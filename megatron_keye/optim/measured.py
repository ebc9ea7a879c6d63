# SPDX-License-Identifier: Apache-2.0
"""What all ranks measured of a step before its update: one small table, the same on every rank.

From it every rank draws the same conclusion: whether weights change, and which rank is to blame.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.optim.finite import STATE_KINDS

Figure = Literal[
    "decoder norm",
    "vision norm",
    "loss",
    "indexer KL",
    "own gradients",
    "weights",
    "first moments",
    "second moments",
]
FIGURES: tuple[Figure, ...] = (
    *("decoder norm", "vision norm", "loss", "indexer KL", "own gradients"),
    *STATE_KINDS,
)
"""Columns of the table: L2 norms of the gradients of a whole grid; a rank's sums of losses; the L2
norm of its own gradients before they are reduced; 1 where a number of its optimizer state is sick.
"""


@dataclass(frozen=True)
class Measured:
    """The figures of one step, the same on every rank."""

    by_rank: dict[Figure, tuple[float, ...]]
    """Each figure of all ranks, 0 where a rank has none."""

    @property
    def gradient_norm(self) -> float:
        """L2 norm over decoder and vision together, before clipping; infinity for NaN."""
        grids: tuple[Figure, ...] = ("decoder norm", "vision norm")
        return math.sqrt(sum(_largest(self.by_rank[grid]) ** 2 for grid in grids))

    @property
    def loss_sum(self) -> float:
        """Sum of the language loss over all labels."""
        return sum(self.by_rank["loss"])

    @property
    def sick(self) -> dict[str, list[int]]:
        """Which figures are not finite or stand for a sick state, with the ranks that say so."""
        found: dict[str, list[int]] = {}
        sums: tuple[Figure, ...] = ("loss", "indexer KL", "own gradients")
        for figure in sums:
            values = enumerate(self.by_rank[figure])
            found[figure.removeprefix("own ")] = [r for r, v in values if not math.isfinite(v)]
        for kind in STATE_KINDS:
            found[kind] = [rank for rank, mark in enumerate(self.by_rank[kind]) if mark]
        if math.isinf(self.gradient_norm) and not found["gradients"]:
            # Finite on each rank and not in their sum.
            found["sum of gradients"] = list(range(len(self.by_rank["loss"])))
        return {name: ranks for name, ranks in found.items() if ranks}


def gather(row: Tensor, *, rank: int, num_ranks: int, meanwhile: Callable[[], bool]) -> Measured:
    """Collect the rows of all ranks. Collective: all ranks must call it.

    A sum of rows that are 0 elsewhere, which is exact, and fast where a gather is not.

    Args:
        row: This rank's figures in the order of FIGURES: float64 [figures].
        rank: This rank.
        num_ranks: World size.
        meanwhile: Called repeatedly while other ranks still compute, until it returns False. It
            must not communicate.
    """
    table = row.new_zeros(num_ranks, len(FIGURES))
    table[rank] = row
    work = dist.all_reduce(table, async_op=True)
    assert work is not None, "every rank is in the default group"
    while not work.is_completed() and meanwhile():
        pass
    work.wait()
    return Measured(dict(zip(FIGURES, map(tuple, table.T.tolist()), strict=True)))


def norm_of(tensors: list[Tensor], device: torch.device | int) -> Tensor:
    """Return the L2 norm of all elements of some tensors: float64 []."""
    norms = torch._foreach_norm(tensors) if tensors else ()
    parts = [norm.double() for norm in norms]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([zero, *parts]))
    return norm


def _largest(values: tuple[float, ...]) -> float:
    """Return the largest value, infinity if any is not finite: a maximum ignores NaN."""
    return max(values) if all(map(math.isfinite, values)) else math.inf
