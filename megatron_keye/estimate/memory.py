# SPDX-License-Identifier: Apache-2.0
"""Estimates the memory that a run needs on each device, from sizes and degrees.

Activations are what autograd saves in this code, tensor by tensor; test_memory.py compares them
with measurements on GPUs. A fused kernel that is "auto" counts as one that runs: without
Transformer Engine norms keep 6 % more of a layer. Not counted are the contexts of CUDA and NCCL
and the allocator's fragmentation, together a few GiB. Standard library and numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.model import VisionConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.state import (
    BYTES,
    Parameters,
    brief_bytes,
    state_bytes,
)
from megatron_keye.plan.places import is_encoded_by_decoder

RESERVED_BYTES = 8 * 2**30
"""For the contexts of CUDA and NCCL, the allocator's fragmentation, and rows with more labels."""
INACCURACY = 1.05
"""These figures agree with measurements within 5 %."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Expected bytes on one rank."""

    weights: float = 0.0
    """Weights in the run's precision."""
    gradients: float = 0.0
    """Gradients of what learns, summed over micro-batches."""
    optimizer: float = 0.0
    """Moments, and with bf16 master weights, as far as they are on the device."""
    activations: float = 0.0
    """Saved from forward to backward passes: of decoder layers, or of a chunk of pictures."""
    features: float = 0.0
    """Features in transport: a step's on a decoder rank, a row's on a vision rank."""
    workspace: float = 0.0
    """Temporary tensors of one layer, or of the logits."""

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(vars(self).values()))


def decoder_memory(
    run: RunConfig, stage: int, held: Sequence[Parameters], *, num_labels: int, num_patches: int
) -> Memory:
    """Return the memory of a decoder rank, with vision's where it encodes too.

    Args:
        run: Sizes and degrees.
        stage: 0-based pipeline stage.
        held: Parameters on the rank.
        num_labels: Tokens of a row that have a label; only these have logits.
        num_patches: Patches of a row's pictures.
    """
    degrees, training, decoder = run.parallel.decoder, run.training, run.model.decoder
    states = state_bytes(run, held)
    num_tokens = run.data.row_tokens / degrees.context / degrees.tensor
    kept, again = _kept_and_recomputed(run)
    activations = _layers_in_flight(run, stage) * kept * num_tokens
    # One layer at a time is recomputed.
    workspace = (_layer_workspace(run) + again) * num_tokens + _expert_gradient_bytes(run)
    if stage == degrees.pipeline - 1:
        # Logits, their float32 copy and its gradient.
        width = decoder.vocab_size / degrees.tensor
        logits = num_labels / degrees.context * width * (BYTES[training.precision] + 8)
        workspace = max(workspace, logits)
    features = 0.0
    if stage == 0:
        features = _feature_bytes(run, num_patches / degrees.context / degrees.tensor)
        features *= training.rows_per_step / degrees.data
    if run.parallel.vision.decoder_encodes:
        # Vision's passes come before and after the decoder's, so the larger of the two counts;
        # what waits from one to the other counts beside it.
        kept_chunks = _kept_chunk_bytes(run, num_patches, is_decoder=True)
        activations = max(activations, _chunk_bytes(run)) + kept_chunks
    workspace = max(workspace, brief_bytes(run, held) - activations)
    return Memory(**states, activations=activations, features=features, workspace=workspace)


def vision_memory(run: RunConfig, held: Sequence[Parameters], *, num_patches: int) -> Memory:
    """Return the memory of a dedicated vision rank.

    Args:
        run: Sizes and degrees.
        held: Parameters on the rank.
        num_patches: Patches of a row's pictures.
    """
    features = _feature_bytes(run, num_patches)
    width = 2 * run.model.vision.intermediate_size * BYTES[run.training.precision]
    chunk = _chunk_bytes(run)
    return Memory(
        **state_bytes(run, held),
        activations=chunk + _kept_chunk_bytes(run, num_patches, is_decoder=False),
        features=features,
        workspace=max(width * run.parallel.vision.chunk_patches, brief_bytes(run, held) - chunk),
    )


def _layer_bytes(run: RunConfig) -> float:
    """Return the bytes that autograd saves per decoder layer and local token, of a whole layer.

    Under tensor parallelism each rank saves its share of all but the indexer, which runs whole on
    every rank; it is counted as if it were split too, except for the selected keys.
    """
    size = BYTES[run.training.precision]
    return size * (_saved_by_attention(run) + _saved_by_experts(run)) + _selection(run)


def _kept_and_recomputed(run: RunConfig) -> tuple[float, float]:
    """Return bytes per layer and token: kept for the backward pass, and made again in it."""
    decoder, recompute = run.model.decoder, run.training.recompute
    size, whole = BYTES[run.training.precision], _layer_bytes(run)
    experts = size * _saved_by_experts(run)
    kept = float(size * decoder.hidden_size)
    if run.training.only_indexers_learn:
        # The indexer's queries and their gradients, which its loss computes in the forward pass.
        kept += size * 2 * decoder.indexer.num_heads * decoder.indexer.head_dim
    elif recompute == "none":
        return whole, 0.0
    elif recompute == "experts":
        return whole - experts, experts
    if run.training.keeps_in_host_memory:
        return kept, whole
    if recompute in ("selective", "full"):
        kept += _kept_selection(run)
    if recompute == "selective":
        # Attention's output and the log-sum-exp of each head, which the second pass takes.
        outputs = decoder.num_heads * (size * decoder.head_dim + max(4, size))
        return kept + outputs, whole - outputs
    return kept, whole


def _kept_selection(run: RunConfig) -> float:
    """Return the bytes per local token of a packed selection, whole on each tensor rank."""
    if run.training.phase != "sparse":
        return 0.0
    blocks = -(-run.data.row_tokens // 2**16)
    return (2 * run.model.decoder.indexer.top_k + 4 * blocks) * run.parallel.decoder.tensor


def _is_fused(run: RunConfig, name: Literal["swiglu", "norm"]) -> bool:
    fusion = getattr(run.training.fusions, name)
    return fusion != "off" and run.training.precision != "fp64"


def _saved_by_attention(run: RunConfig) -> float:
    """Count elements: the residual stream and its norm, twice; queries, keys and values after the
    projection, as inputs of norms and of attention, gathered over the context axis; its output;
    the indexer's queries. Plain norms keep queries and keys once more.
    """
    decoder, context = run.model.decoder, run.parallel.decoder.context
    heads = decoder.num_heads * decoder.head_dim
    groups = decoder.num_kv_heads * decoder.head_dim
    projected = heads + 2 * groups
    indexer = 2 * decoder.indexer.num_heads * decoder.indexer.head_dim
    gathered = (1 + 2 * context) * groups
    copies = 0 if _is_fused(run, "norm") else heads + groups
    return 4 * decoder.hidden_size + projected + 2 * heads + gathered + heads + indexer + copies


def _saved_by_experts(run: RunConfig) -> float:
    """Count elements of each expert that a token is routed to: its input, gate and value, and
    their product. Plain SwiGLU keeps the activated gate and the product without its weight too.
    """
    decoder, experts = run.model.decoder, run.model.decoder.experts
    num_inner = 3 if _is_fused(run, "swiglu") else 5
    width = decoder.hidden_size + num_inner * experts.intermediate_size
    return experts.num_experts_per_token * width


def _selection(run: RunConfig) -> float:
    """Return the bytes per token for its selected keys: indices, scores, and a share of the union
    with neighbouring queries, at its largest, where they share no key.
    """
    if run.training.phase != "sparse":
        return 0.0
    return run.model.decoder.indexer.top_k * (4 + 4 + 6) * run.parallel.decoder.tensor


def _layer_workspace(run: RunConfig) -> float:
    """Return the bytes per token in the experts' backward pass: gradients of their outputs, of
    gate and value, of their inputs, and of the layer's output and input. Plain SwiGLU makes that
    of the product in float32.
    """
    decoder, size = run.model.decoder, BYTES[run.training.precision]
    experts = decoder.experts
    of_row = size * 2 * (decoder.hidden_size + experts.intermediate_size)
    if not _is_fused(run, "swiglu"):
        of_row += max(4, size) * experts.intermediate_size
    return experts.num_experts_per_token * of_row + size * 2 * decoder.hidden_size


def _expert_gradient_bytes(run: RunConfig) -> float:
    """Return the bytes of a layer's gate and up gradients before they are added to the sums."""
    decoder, training = run.model.decoder, run.training
    learns = training.is_trained("decoder", is_adapter=False)
    if training.expert_layers != "torch" or not learns:
        return 0.0
    num_experts = decoder.experts.num_experts / run.parallel.decoder.expert
    num_weights = 2 * decoder.experts.intermediate_size * decoder.hidden_size
    return BYTES[training.precision] * num_experts * num_weights


def _layers_in_flight(run: RunConfig, stage: int) -> float:
    """Return how many layers' activations a stage holds at most, under (interleaved) 1F1B."""
    degrees = run.parallel.decoder
    micro_batches = run.training.rows_per_step // degrees.data
    num_virtual = degrees.virtual_stages
    later = degrees.pipeline - stage - 1
    warm_up = later if num_virtual == 1 else 2 * later + (num_virtual - 1) * degrees.pipeline
    in_flight = min(warm_up + 1, micro_batches * num_virtual)
    layers = [
        len(degrees.virtual_stage_layers(run.model.decoder.num_layers, stage, virtual))
        for virtual in range(num_virtual)
    ]
    return in_flight * sum(layers) / num_virtual


def patch_bytes(run: RunConfig) -> float:
    """Return the bytes that autograd saves per patch, where ViT or projector is trained."""
    vision, size = run.model.vision, BYTES[run.training.precision]
    layers = vision.num_layers if "vision" in run.training.trained_parts else 1
    return float(size * layers * _saved_by_vision_layer(vision))


def _chunk_bytes(run: RunConfig) -> float:
    """Return the bytes of a chunk of pictures: of all saved activations if vision is trained."""
    num_patches = run.parallel.vision.chunk_patches
    if _vision_learns(run):
        return num_patches * patch_bytes(run)
    return num_patches * BYTES[run.training.precision] * 4 * run.model.vision.intermediate_size


def _kept_chunk_bytes(run: RunConfig, num_patches: int, *, is_decoder: bool) -> float:
    """Return the bytes of activations that wait for a step's backward passes of vision.

    None with "auto", which takes only what all else leaves free.
    """
    vision, degrees = run.parallel.vision, run.parallel.decoder
    if vision.recompute != "off" or not _vision_learns(run):
        return 0.0
    micro_batches = run.training.rows_per_step // degrees.data
    of_decoder = sum(is_encoded_by_decoder(vision, m, micro_batches) for m in range(micro_batches))
    num_rows = degrees.data * (of_decoder if is_decoder else micro_batches - of_decoder)
    of_step = num_patches * num_rows / (degrees.num_ranks if is_decoder else vision.num_ranks)
    return max(0.0, of_step * patch_bytes(run) - _chunk_bytes(run))


def _vision_learns(run: RunConfig) -> bool:
    return bool({"vision", "projector"} & set(run.training.trained_parts))


def _saved_by_vision_layer(vision: VisionConfig) -> float:
    """Count elements per patch: the residual stream and its norm, twice; rotated queries and keys,
    values, attention's output and that concatenated over frames; input and output of the GELU.
    """
    return 9 * vision.hidden_size + 2 * vision.intermediate_size


def _feature_bytes(run: RunConfig, num_patches: float) -> float:
    """Return the bytes of the features of so many patches, later reused by their gradients."""
    tokens = num_patches / run.model.vision.merge_size**2
    return float(tokens * run.model.decoder.hidden_size * BYTES[run.training.precision])
