# SPDX-License-Identifier: Apache-2.0
"""The full-size ViT and four full-size decoder layers on two large GPUs, for measurements.

keye_two_gpus: one vision rank and one decoder rank; a row of 32K tokens holds a minute of 720p
video. docs/overlap.md has the commands that make the video and draw the timeline.

keye_two_gpus_rl: the same layers learn from rewards of answers about one-minute videos, on both
GPUs alike. docs/answers.md has the commands.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderParallel,
    FrameConfig,
    HealthConfig,
    OptimizerConfig,
    ParallelConfig,
    PostTrainingConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    VisionParallel,
)
from megatron_keye.recipes.keye_30b_a3b import keye_30b_a3b

_PROMPT_TOKENS, _VIDEO_TOKENS = 32_768, 30_720
_ANSWERS, _NEW_TOKENS = 8, 256


def keye_two_gpus(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for two ranks.

    Args:
        num_ranks: 2, unless --set changes the degrees.
        has_gpu: Chooses bf16 or fp32.
    """
    full = keye_30b_a3b(num_ranks=num_ranks, has_gpu=has_gpu)
    # Four layers and the embeddings have 3.1 of 31 billion parameters: 56 GB with the optimizer.
    return RunConfig(
        name="keye_two_gpus",
        model=replace(full.model, decoder=replace(full.model.decoder, num_layers=4)),
        # 120 frames of 256 tokens, with timestamps as text, are 31.9K tokens.
        data=DataConfig(samples="runs/long_video/60s.jsonl", row_tokens=32_768),
        parallel=ParallelConfig(
            decoder=DecoderParallel(),
            vision=VisionParallel(placement="dedicated", num_ranks=1),
        ),
        training=TrainingConfig(
            steps=3,
            rows_per_step=6,
            precision="bf16" if has_gpu else "fp32",
            checkpoint=CheckpointConfig(saves_last=False),
        ),
    )


def keye_two_gpus_rl(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that learns from rewards, for the given number of ranks.

    Answers of layers with random weights earn nothing, so groups of equal rewards stay, and
    answers that end by their length count: what is measured is what a step takes.

    Args:
        num_ranks: GPUs of 141 GB; all are data-parallel, and share the experts.
        has_gpu: Chooses bf16 or fp32.
    """
    full = keye_two_gpus(num_ranks=num_ranks, has_gpu=has_gpu)
    degrees = DecoderParallel(data=num_ranks, expert=num_ranks)
    return replace(
        full,
        name="keye_two_gpus_rl",
        data=replace(
            full.data,
            samples="runs/minute/train.questions.jsonl",
            # A prompt of 31K tokens, and eight answers to it behind it.
            row_tokens=_PROMPT_TOKENS + _ANSWERS * _NEW_TOKENS,
            frames=FrameConfig(max_tokens_per_video=_VIDEO_TOKENS),
        ),
        parallel=ParallelConfig(decoder=degrees),
        training=replace(
            full.training,
            steps=3,
            rows_per_step=num_ranks,
            expert_layers="torch",
            frozen=("vision", "projector", "indexer"),
            optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=1, schedule="constant"),
            health=HealthConfig(spike_score=0.0),
        ),
        rollout=RolloutConfig(max_new_tokens=_NEW_TOKENS, cache_tokens=8 * _PROMPT_TOKENS),
        post_training=PostTrainingConfig(
            kind="gspo",
            prompts_per_step=2 * num_ranks,
            answers_per_prompt=_ANSWERS,
            minibatches=2,
            drops_equal_groups=False,
            truncated="scored",
        ),
    )


RECIPES = {"keye_two_gpus": keye_two_gpus, "keye_two_gpus_rl": keye_two_gpus_rl}
