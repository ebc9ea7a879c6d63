# SPDX-License-Identifier: Apache-2.0
"""The work of one module of the model in one step: FLOPs and bytes of each pass.

A product of [m, k] and [k, n] counts 2 m k n FLOPs (Narayanan et al., arXiv:2104.04473,
appendix). Elementwise work counts none, nor do sums over heads weighted by gates; of modules that
do nothing else the bytes say how long they take.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

Module = Literal[
    "vision.linear",
    "vision.attention",
    "vision.norms",
    "projector",
    "embedding",
    "decoder.norms",
    "decoder.attention.projections",
    "decoder.indexer.projections",
    "decoder.indexer.scores",
    "decoder.indexer.top_k",
    "decoder.attention.selected",
    "decoder.attention.dense",
    "decoder.indexer.loss",
    "decoder.indexer.recall",
    "decoder.router",
    "decoder.experts",
    "vocabulary",
    "optimizer",
]
MODULES: tuple[Module, ...] = get_args(Module)
"""In the order in which they run."""

Precision = Literal["bf16", "fp32", "fp64"]


def widened(precision: Precision) -> Precision:
    """Return the type of what is computed in float32 or better."""
    return "fp64" if precision == "fp64" else "fp32"


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A number of FLOPs or bytes, by the pass that they belong to."""

    forward: float = 0.0
    """Of the forward pass; of the update for the optimizer."""
    backward: float = 0.0
    """Of the backward pass, without what it only repeats."""
    recomputed: float = 0.0
    """What the backward pass repeats of the forward pass, to have what was not kept: layers and
    chunks, and in attention's kernels the products of queries and keys."""

    @property
    def total(self) -> float:
        """Sum over all passes."""
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: "Passes") -> "Passes":
        """Return the sum, pass by pass."""
        return Passes(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recomputed=self.recomputed + other.recomputed,
        )

    def __mul__(self, factor: float) -> "Passes":
        """Return each number times a factor."""
        return Passes(
            forward=self.forward * factor,
            backward=self.backward * factor,
            recomputed=self.recomputed * factor,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one module does in a step, on one rank or on all together."""

    module: Module
    """Its name."""
    precision: Precision
    """Type that its products multiply, which decides the device's peak."""
    model_flops: Passes = Passes()
    """The model's mathematics, once: real tokens, pairs that attend, gradients that something
    learns from. Nothing is recomputed; what ranks repeat of each other counts once."""
    executed_flops: Passes = Passes()
    """What kernels on a GPU run: padding, recomputation and repetition on several ranks too.
    Pairs count singly: not the rest of a tile that a causal mask cuts, nor the keys of a union
    that only a neighbour selects."""
    moved_bytes: Passes = Passes()
    """Bytes that pass through the device's memory at least: each module reads its operands once a
    row or chunk and writes its results once, as if it were one kernel without a cache beyond."""

    def __add__(self, other: "Work") -> "Work":
        """Return the work of one module in two places together."""
        assert self.key == other.key, f"{self.key} and {other.key} are different work"
        return replace(
            self,
            model_flops=self.model_flops + other.model_flops,
            executed_flops=self.executed_flops + other.executed_flops,
            moved_bytes=self.moved_bytes + other.moved_bytes,
        )

    def __mul__(self, factor: float) -> "Work":
        """Return so many times this work."""
        return replace(
            self,
            model_flops=self.model_flops * factor,
            executed_flops=self.executed_flops * factor,
            moved_bytes=self.moved_bytes * factor,
        )

    @property
    def key(self) -> tuple[Module, Precision]:
        """What works must share to be added."""
        return self.module, self.precision


def add_works(works: Iterable[Work]) -> list[Work]:
    """Return one work for each module and precision, in the order of MODULES."""
    sums: dict[tuple[Module, Precision], Work] = {}
    for work in works:
        sums[work.key] = sums[work.key] + work if work.key in sums else work
    return sorted(sums.values(), key=lambda work: (MODULES.index(work.module), work.precision))


def total_model_flops(works: Iterable[Work]) -> float:
    """Return the model FLOPs of all works and passes."""
    return sum(work.model_flops.total for work in works)


def total_executed_flops(works: Iterable[Work]) -> float:
    """Return the executed FLOPs of all works and passes."""
    return sum(work.executed_flops.total for work in works)
