"""What a step asks for in floating-point operations, and what a device could do at best.

Counted are the products of the model's mathematics over real tokens, both directions: a matrix
that learns is multiplied three times. Not counted are padding, norms and other elementwise work,
the optimizer, and whatever an implementation does twice: layers that are recomputed, chunks that
the ViT encodes again for its backward pass, products of queries and keys that the indexer's loss
needs once more. Model FLOPs utilization so defined: PaLM (arXiv:2204.02311), appendix B.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Part
from megatron_keye.data.row import PackedRow
from megatron_keye.plan.cost import (
    block_flops,
    frame_attention_flops,
    indexing_flops,
    num_pairs,
    pair_flops,
    patch_flops,
    projector_flops,
    score_flops,
)

PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H800": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
}
"""Dense bf16 peaks of NVIDIA's data sheets, by the beginning of the name that CUDA gives."""


def peak_tflops(run: RunConfig, device_name: str) -> float:
    """Return what one device can do at best, in 1e12 operations per second; NaN if unknown.

    Args:
        run: Its `training.device_peak_tflops` comes first. Names are known in bf16 only.
        device_name: As CUDA gives it.
    """
    if run.training.device_peak_tflops:
        return run.training.device_peak_tflops
    known = [
        name for name in PEAK_TFLOPS if f"{device_name} ".startswith((f"{name} ", f"{name}-"))
    ]
    if run.training.precision != "bf16" or not known:
        return math.nan
    return PEAK_TFLOPS[max(known, key=len)]


def device_name(device: torch.device) -> str:
    """Return the name that CUDA gives a GPU, "CPU" for the rest."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def step_flops(rows: Sequence[PackedRow], run: RunConfig) -> float:
    """Return the operations of one training step, over all ranks together.

    Args:
        rows: Of the global batch.
        run: Sizes, phase, and which parts learn. With a feature cache the ViT counts nothing.
    """
    return sum(_vision_flops(row, run) + _decoder_flops(row, run) for row in rows)


def _vision_flops(row: PackedRow, run: RunConfig) -> float:
    vision, learning = run.model.vision, run.training.trained_parts
    sizes = [picture.num_patches for picture in row.pictures]
    encoder = patch_flops(vision) * sum(sizes)
    encoder += sum(frame_attention_flops(vision, size) for size in sizes)
    projector = projector_flops(vision, run.model.decoder.hidden_size) * sum(sizes)
    encoded = 0 if run.data.feature_cache else 3 if "vision" in learning else 1
    projected = 1 + ("vision" in learning) + ("projector" in learning)
    return encoded * encoder + projected * projector


def _decoder_flops(row: PackedRow, run: RunConfig) -> float:
    decoder, learning = run.model.decoder, run.training.trained_parts
    # The padding's document comes last, and nobody learns from it.
    bounds = np.minimum(row.document_bounds, row.num_real_tokens)
    lengths, num_tokens = np.diff(bounds), row.num_real_tokens
    phase = run.training.row_phase(row.longest_document)
    passes_gradients = not run.training.only_indexers_learn
    multiplied = 1 + passes_gradients + ("decoder" in learning)
    top_k = decoder.indexer.top_k if phase == "sparse" else None
    met = num_pairs(lengths, top_k)
    layer = multiplied * block_flops(decoder) * num_tokens
    layer += (1 + 2 * passes_gradients) * pair_flops(decoder) * met
    if phase != "dense":
        layer += _indexer_flops(decoder, learning, num_tokens, scored=num_pairs(lengths), met=met)
    head = 2.0 * decoder.hidden_size * decoder.vocab_size * row.num_loss_tokens
    return decoder.num_layers * layer + multiplied * head


def _indexer_flops(
    decoder: DecoderConfig, learning: Sequence[Part], num_tokens: int, *, scored: float, met: float
) -> float:
    """Return one layer's operations; its loss compares the pairs that attention met, and ends
    at what the indexer is given.
    """
    learns = "indexer" in learning
    made = (1 + learns) * indexing_flops(decoder) * num_tokens
    return made + score_flops(decoder) * (scored + 2 * learns * met)
