"""What pictures and rows cost, for balancing and for the simulator.

Counts of multiplications; only their ratios decide who gets what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.model import DecoderConfig, VisionConfig
from megatron_keye.config.parallel import VisionParallel
from megatron_keye.config.training import Phase


@dataclass(frozen=True)
class VisionCost:
    """Cost of encoding a frame: linear in its patches, plus its attention."""

    break_even_patches: float
    """Patches of a frame whose attention costs as much as everything else."""

    def of_frame(self, num_patches: int) -> float:
        """Return the cost, in patches of vanishingly small frames."""
        return num_patches * (1 + num_patches / self.break_even_patches)


def vision_cost(vision: VisionConfig, parallel: VisionParallel) -> VisionCost:
    """Return the configured cost, or that of the model's sizes.

    A layer multiplies 4 W^2 + 2 W F numbers a patch in its matrices and 2 W a pair of patches in
    its attention (W hidden_size, F intermediate_size), so both are equal at 2 W + F patches.
    """
    counted = 2 * vision.hidden_size + vision.intermediate_size
    return VisionCost(parallel.attention_break_even_patches or counted)


def vision_flops(vision: VisionConfig, decoder_width: int) -> float:
    """Return the floating-point operations of one patch's forward pass, attention left out."""
    width, wide = vision.hidden_size, vision.intermediate_size
    layers = vision.num_layers * (4 * width**2 + 2 * width * wide)
    embedding = 3 * vision.patch_size**2 * width
    merged = width * vision.merge_size**2
    projector = (merged * merged + merged * decoder_width) / vision.merge_size**2
    return 2.0 * (layers + embedding + projector)


def attention_flops(
    document_lengths: Sequence[int] | NDArray[np.int64], decoder: DecoderConfig, phase: Phase
) -> float:
    """Return one layer's forward operations over pairs of tokens, for one row.

    This is what rows of equal length differ in: a query meets the keys of its own document only.

    Args:
        document_lengths: Tokens of each document of the row, padding included.
        decoder: Sizes.
        phase: Dense attention meets all pairs; sparse attention the selected ones, but the
            indexer scores all.
    """
    lengths = np.asarray(document_lengths, dtype=np.float64)
    pairs = float((lengths * (lengths + 1) / 2).sum())
    attention = 4.0 * decoder.num_heads * decoder.head_dim
    indexer = 2.0 * decoder.indexer.num_heads * decoder.indexer.head_dim
    if phase == "dense":
        return attention * pairs
    if phase == "indexer_warmup":
        return (attention + indexer) * pairs
    top_k = decoder.indexer.top_k
    short = np.minimum(lengths, top_k)
    selected = float((short * (short + 1) / 2 + (lengths - short) * top_k).sum())
    return attention * selected + indexer * pairs


def token_flops(decoder: DecoderConfig) -> float:
    """Return one layer's forward operations of one token outside its attention to others."""
    width, indexer = decoder.hidden_size, decoder.indexer
    heads = (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    indexing = (indexer.num_heads + 1) * indexer.head_dim + indexer.num_heads
    experts = decoder.experts
    routed = 3 * experts.num_experts_per_token * experts.intermediate_size + experts.num_experts
    return 2.0 * width * (heads + indexing + routed)
