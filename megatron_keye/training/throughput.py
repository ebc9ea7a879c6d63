"""Model FLOPs of a training step, and the peak of a device.

Counted are the model's matrix products over real tokens, forward and backward: a trained matrix
counts three times, a frozen one that passes gradients twice. Not counted are padding, norms and
other elementwise work, adapters, the optimizer, and recomputation: of decoder layers, of chunks
for the ViT's backward pass, of products of queries and keys for the indexer's loss. Model FLOPs
utilization as in PaLM (arXiv:2204.02311), appendix B.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.run import RunConfig
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
"""Dense bf16 peaks of NVIDIA's data sheets in TFLOP/s, by prefix of CUDA's device name."""


def peak_tflops(run: RunConfig, device_name: str) -> float:
    """Return the peak of one device in TFLOP/s; NaN if unknown.

    Args:
        run: Its `training.device_peak_tflops` takes precedence; the table holds for bf16 only.
        device_name: From `device_name`.
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
    """Return CUDA's name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def step_flops(rows: Sequence[PackedRow], run: RunConfig) -> float:
    """Return the model FLOPs of one training step, summed over all ranks.

    Args:
        rows: Rows of the global batch.
        run: Sizes, phase and trained parts. With a feature cache the ViT counts as 0.
    """
    return sum(_vision_flops(row, run) + _decoder_flops(row, run) for row in rows)


def _vision_flops(row: PackedRow, run: RunConfig) -> float:
    vision, training = run.model.vision, run.training
    passes_gradients = "vision" in training.trained_parts
    encoder_learns = training.is_trained("vision", is_adapter=False)
    projector_learns = training.is_trained("projector", is_adapter=False)
    sizes = [picture.num_patches for picture in row.pictures]
    encoder = patch_flops(vision) * sum(sizes)
    encoder += sum(frame_attention_flops(vision, size) for size in sizes)
    projector = projector_flops(vision, run.model.decoder.hidden_size) * sum(sizes)
    encoder_passes = 0 if run.data.feature_cache else 1 + passes_gradients + encoder_learns
    projector_passes = 1 + passes_gradients + projector_learns
    return encoder_passes * encoder + projector_passes * projector


def _decoder_flops(row: PackedRow, run: RunConfig) -> float:
    decoder, trained = run.model.decoder, run.training.trained_parts
    # Padding is the last document, and does not count.
    branches, num_tokens = row.branches, row.num_real_tokens
    lengths, earlier = np.diff(np.minimum(branches.bounds, num_tokens)), branches.num_earlier
    phase = run.training.row_phase(row.longest_document)
    passes_gradients = not run.training.only_indexers_learn
    learns = run.training.is_trained("decoder", is_adapter=False)
    num_products = 1 + passes_gradients + learns
    top_k = decoder.indexer.top_k if phase == "sparse" else None
    attended, scored = num_pairs(lengths, top_k, earlier), num_pairs(lengths, None, earlier)
    layer = num_products * block_flops(decoder) * num_tokens
    layer += (1 + 2 * passes_gradients) * pair_flops(decoder) * attended
    if phase != "dense":
        layer += _indexer_flops(
            decoder, num_tokens, scored=scored, attended=attended, learns="indexer" in trained
        )
    output = 2.0 * decoder.hidden_size * decoder.vocab_size * row.num_loss_tokens
    return decoder.num_layers * layer + num_products * output


def _indexer_flops(
    decoder: DecoderConfig, num_tokens: int, *, scored: float, attended: float, learns: bool
) -> float:
    """Return one layer's FLOPs; backward covers attended pairs and ends at the indexer's input."""
    projections = (1 + learns) * indexing_flops(decoder) * num_tokens
    return projections + score_flops(decoder) * (scored + 2 * learns * attended)
