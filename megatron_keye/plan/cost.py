"""What pictures and rows cost, for balancing, the simulator and the count of a step's FLOPs.

A product of [m, k] and [k, n] counts 2 m k n operations (Narayanan et al., arXiv:2104.04473, its
appendix); balancing needs only their ratios.
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

    A layer multiplies 4 W^2 + 2 W F numbers per patch in its matrices and 2 W per pair of patches
    in its attention (W hidden_size, F intermediate_size), so both are equal at 2 W + F patches.
    """
    counted = 2 * vision.hidden_size + vision.intermediate_size
    return VisionCost(parallel.attention_break_even_patches or counted)


def vision_flops(vision: VisionConfig, decoder_width: int) -> float:
    """Return the floating-point operations of one patch's forward pass, attention left out."""
    return patch_flops(vision) + projector_flops(vision, decoder_width)


def patch_flops(vision: VisionConfig) -> float:
    """Return the ViT's forward operations of one patch, attention left out."""
    width, wide = vision.hidden_size, vision.intermediate_size
    layers = vision.num_layers * (4 * width**2 + 2 * width * wide)
    return 2.0 * (layers + 3 * vision.patch_size**2 * width)


def projector_flops(vision: VisionConfig, decoder_width: int) -> float:
    """Return the projector's forward operations of one patch, a share of its merged one's."""
    merged = vision.hidden_size * vision.merge_size**2
    return 2.0 * merged * (merged + decoder_width) / vision.merge_size**2


def frame_attention_flops(vision: VisionConfig, num_patches: int) -> float:
    """Return the forward operations of attention in one frame, in which all patches meet."""
    return 4.0 * vision.num_layers * vision.hidden_size * num_patches**2


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
    met = num_pairs(document_lengths, decoder.indexer.top_k if phase == "sparse" else None)
    flops = pair_flops(decoder) * met
    if phase != "dense":
        flops += score_flops(decoder) * num_pairs(document_lengths)
    return flops


def num_pairs(
    document_lengths: Sequence[int] | NDArray[np.int64], top_k: int | None = None
) -> float:
    """Return how many keys all queries of a row meet, each at most `top_k` if that is given.

    A document of n tokens has n (n + 1) / 2 causal pairs; with top_k = k < n, the first k queries
    meet k (k + 1) / 2 and each later one k.
    """
    lengths = np.asarray(document_lengths, dtype=np.float64)
    short = lengths if top_k is None else np.minimum(lengths, top_k)
    return float((short * (short + 1) / 2 + (lengths - short) * short).sum())


def pair_flops(decoder: DecoderConfig) -> float:
    """Return the forward operations of attention between a query and a key, in one layer."""
    return 4.0 * decoder.num_heads * decoder.head_dim


def score_flops(decoder: DecoderConfig) -> float:
    """Return the forward operations of the indexer's score of a pair, in one layer."""
    return 2.0 * decoder.indexer.num_heads * decoder.indexer.head_dim


def token_flops(decoder: DecoderConfig) -> float:
    """Return one layer's forward operations of one token outside its attention to others."""
    return block_flops(decoder) + indexing_flops(decoder)


def block_flops(decoder: DecoderConfig) -> float:
    """Return the part of `token_flops` that a layer without an indexer has, too."""
    heads = (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    experts = decoder.experts
    routed = 3 * experts.num_experts_per_token * experts.intermediate_size + experts.num_experts
    return 2.0 * decoder.hidden_size * (heads + routed)


def indexing_flops(decoder: DecoderConfig) -> float:
    """Return the part of `token_flops` that makes the indexer's queries, key and weights."""
    indexer = decoder.indexer
    made = (indexer.num_heads + 1) * indexer.head_dim + indexer.num_heads
    return 2.0 * decoder.hidden_size * made
