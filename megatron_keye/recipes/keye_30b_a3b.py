# SPDX-License-Identifier: Apache-2.0
"""Keye-VL-2.0-30B-A3B at full size: 31,122,082,160 parameters, rows of 256K tokens.

The sizes are the released checkpoint's; the degrees suit 64 GPUs of 80 GB in nodes of 8.
"""

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DecoderParallel,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)

_ROW_TOKENS = 262_144
_RANKS_PER_REPLICA = 64


def keye_30b_a3b(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for the given number of ranks.

    Args:
        num_ranks: A multiple of 64; each 64 ranks are a data-parallel replica.
        has_gpu: Chooses bf16 or fp32; a model of this size needs GPUs.
    """
    replicas = max(1, num_ranks // _RANKS_PER_REPLICA)
    return RunConfig(
        name="keye_30b_a3b",
        model=ModelConfig(vision=_vision(), decoder=_decoder()),
        # There are no default samples of this size: set data.samples.
        data=DataConfig(samples="data/train.jsonl", row_tokens=_ROW_TOKENS),
        parallel=ParallelConfig(decoder=_degrees(replicas)),
        training=TrainingConfig(
            steps=10_000,
            # 16 micro-batches in 4 stages: the pipeline bubble is 3 of 19 slots.
            rows_per_step=16 * replicas,
            precision="bf16" if has_gpu else "fp32",
            # 12 layers of 16K tokens per rank fit only if activations are recomputed.
            recompute="full",
            optimizer=OptimizerConfig(
                learning_rate=1e-5, min_learning_rate=1e-6, warmup_steps=200
            ),
            checkpoint=CheckpointConfig(interval_steps=500),
        ),
    )


def _degrees(replicas: int) -> DecoderParallel:
    """Return degrees that fit weights, gradients, optimizer and activations into 80 GB.

    At 18 bytes per parameter, experts (29.0 of 30.5 billion parameters) take 16 GB per GPU with 4
    stages x 8 expert ranks. tensor 2 halves the other weights and the logits; tensor 2 x context 8
    leaves 16K tokens per rank. Tensor and expert groups are consecutive ranks, within a node of 8;
    only context and pipeline, whose messages overlap with computation, cross nodes.
    """
    return DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, data=replicas)


def _vision() -> VisionConfig:
    return VisionConfig(
        num_layers=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        num_packing_positions=32_768,
    )


def _decoder() -> DecoderConfig:
    return DecoderConfig(
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151_936,
        experts=ExpertsConfig(num_experts=128, num_experts_per_token=8, intermediate_size=768),
        indexer=IndexerConfig(num_heads=16, head_dim=64, top_k=2048),
    )


RECIPES = {"keye_30b_a3b": keye_30b_a3b}
