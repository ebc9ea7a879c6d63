# SPDX-License-Identifier: Apache-2.0
"""Video-RL of Keye-VL-2.0-30B-A3B: GSPO on rewards by rule, with the ViT and the projector frozen.

    megatron-keye train keye_video_rl --set data.samples=QUESTIONS.jsonl \\
        --set training.checkpoint.weights=CHECKPOINT

From the paper: GSPO on about 31K questions about videos, ViT and projector frozen, groups of equal
rewards left out. From arXiv 2507.18071, section 5.1: clip widths, four mini-batches, no KL term.
From TimeLens (arXiv 2512.14698): answers without thinking. Ours, since no source gives them: group
size, learning rate, prompts of a step, frozen indexers, rows of 32K tokens.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    DecoderParallel,
    FrameConfig,
    HealthConfig,
    OptimizerConfig,
    ParallelConfig,
    PostTrainingConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_keye.recipes.keye_30b_a3b import keye_30b_a3b

_ROW_TOKENS = 32_768
_NEW_TOKENS = 1_024
_VIDEO_TOKENS = 24_576
"""Leaves room for the times of its frames, about 12 tokens each, the question and the answer."""
_TENSOR, _EXPERT = 4, 8


def keye_video_rl(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for the given number of ranks.

    The same ranks generate and train, without pipeline stages and context ranks: with tensor 4 and
    expert 8 a GPU holds 4.2 billion parameters, 25 GB with their gradients, which leaves room for
    a row of 32K tokens and for the cache.

    Args:
        num_ranks: A multiple of 8; GPUs of 80 GB.
        has_gpu: Chooses bf16 or fp32; a model of this size needs GPUs.
    """
    run = keye_30b_a3b(num_ranks=num_ranks, has_gpu=has_gpu)
    replicas = max(1, num_ranks // _TENSOR)
    degrees = DecoderParallel(tensor=_TENSOR, expert=_EXPERT, data=replicas)
    return replace(
        run,
        name="keye_video_rl",
        data=replace(
            run.data,
            samples="data/questions.jsonl",
            row_tokens=_ROW_TOKENS,
            frames=FrameConfig(max_tokens_per_video=_VIDEO_TOKENS),
        ),
        parallel=ParallelConfig(decoder=degrees),
        training=replace(
            run.training,
            steps=500,
            rows_per_step=replicas,
            frozen=("vision", "projector", "indexer"),
            optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=5, schedule="constant"),
            checkpoint=CheckpointConfig(interval_steps=25),
            # The loss of weighted answers has another meaning in every step.
            health=HealthConfig(spike_score=0.0),
        ),
        rollout=RolloutConfig(
            max_new_tokens=_NEW_TOKENS, cache_tokens=8 * _ROW_TOKENS, skips_thinking=True
        ),
        post_training=PostTrainingConfig(kind="gspo", prompts_per_step=64),
    )


RECIPES = {"keye_video_rl": keye_video_rl}
