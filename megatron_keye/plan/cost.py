# SPDX-License-Identifier: Apache-2.0
"""Costs of pictures and rows, by which work is balanced: FLOPs, of which only ratios matter.

The FLOPs of a pair stand here alone; `estimate/account/` counts all that a step does with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.model import DecoderConfig, VisionConfig
from megatron_keye.config.parallel import VisionParallel
from megatron_keye.config.training import Phase

Lengths = Sequence[int] | NDArray[np.int64]
"""Numbers of tokens."""


@dataclass(frozen=True)
class VisionCost:
    """Cost of encoding a frame: linear in its patches, plus attention, which is quadratic."""

    break_even_patches: float
    """Patches of a frame whose attention costs as much as everything else."""

    def of_frames(self, num_patches: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the cost of each frame, in units of a patch's cost without attention."""
        return num_patches * (1 + num_patches / self.break_even_patches)


def vision_cost(vision: VisionConfig, parallel: VisionParallel) -> VisionCost:
    """Return the cost with the configured break-even size, or with that of the model's sizes.

    Args:
        vision: Sizes.
        parallel: Its attention_break_even_patches; 0 for the derived size.
    """
    return VisionCost(parallel.attention_break_even_patches or derived_break_even(vision))


def derived_break_even(vision: VisionConfig) -> int:
    """Return the patches of a frame whose attention has as many FLOPs as a layer's linears.

    A layer does 4 W^2 + 2 W F multiplications per patch in its linear layers and 2 W per pair of
    patches in attention (W hidden_size, F intermediate_size): as many at 2 W + F patches.
    """
    return 2 * vision.hidden_size + vision.intermediate_size


def attention_flops(
    document_lengths: Lengths, decoder: DecoderConfig, phase: Phase, num_earlier: Lengths = (0,)
) -> float:
    """Return one decoder layer's forward FLOPs over (query, key) pairs of one row.

    Rows of equal length differ in these alone: a query attends to keys of its own document.

    Args:
        document_lengths: Tokens of each document of the row, padding included.
        decoder: Sizes.
        phase: Dense attention is over all causal pairs, sparse attention over the selected ones,
            and the indexer scores all.
        num_earlier: As `num_pairs` takes it.
    """
    top_k = decoder.indexer.top_k if phase == "sparse" else None
    flops = pair_flops(decoder) * num_pairs(document_lengths, top_k, num_earlier)
    if phase != "dense":
        flops += score_flops(decoder) * num_pairs(document_lengths, None, num_earlier)
    return flops


def num_pairs(
    document_lengths: Lengths, top_k: int | None = None, num_earlier: Lengths = (0,)
) -> float:
    """Return the number of causal (query, key) pairs in a row, at most `top_k` for each query.

    A document of n tokens has n (n + 1) / 2; with top_k = k < n, the first k queries have
    k (k + 1) / 2 and each later one k. A branch has those of its path less its earlier tokens'.

    Args:
        document_lengths: Tokens of each document, or of each branch where documents branch.
        top_k: Most keys of a query; None for all.
        num_earlier: Tokens before each branch on its path; 0 for all by default.
    """
    earlier = np.asarray(num_earlier, dtype=np.float64)
    paths = np.asarray(document_lengths, dtype=np.float64) + earlier
    return float((_pairs_of(paths, top_k) - _pairs_of(earlier, top_k)).sum())


def _pairs_of(lengths: NDArray[np.float64], top_k: int | None) -> NDArray[np.float64]:
    short = lengths if top_k is None else np.minimum(lengths, top_k)
    return short * (short + 1) / 2 + (lengths - short) * short


def pair_flops(decoder: DecoderConfig) -> float:
    """Return one layer's forward FLOPs of attention per (query, key) pair."""
    return 4.0 * decoder.num_heads * decoder.head_dim


def score_flops(decoder: DecoderConfig) -> float:
    """Return one layer's forward FLOPs of the indexer's score per (query, key) pair."""
    return 2.0 * decoder.indexer.num_heads * decoder.indexer.head_dim
