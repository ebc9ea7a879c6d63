"""A tiny Keye-VL that learns from rewards when something is on the screen, on a CPU.

    megatron-keye forge_video runs/rl --samples 2000 --held-out 128 --seconds 7 9 --rate 1 \\
        --plain --variable 0 --words 0 --blinking 0 --size 28 28 --shapes 4 --stay 1 \\
        --questions when --tokenizer
    megatron-keye train keye_tiny_rl_start --ranks 1
    megatron-keye train keye_tiny_rl --ranks 1
    megatron-keye evaluate keye_tiny_rl --task grounding --out runs/rl_scores \\
        --set rollout.temperature=0 \\
        --samples runs/rl/held_out.questions.jsonl --weights runs/keye_tiny_rl

A short supervised run teaches the form of an answer and a little of when; then rewards of its own
answers take the model further. The ViT and the projector are frozen then.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    HealthConfig,
    OptimizerConfig,
    PostTrainingConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_keye.recipes.keye_tiny_grounding import keye_tiny_grounding

FOLDER = "runs/rl"
"""Where the command above writes."""


def keye_tiny_rl_start(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the supervised run that comes first, for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    run = keye_tiny_grounding(num_ranks=num_ranks, has_gpu=has_gpu)
    return replace(
        run,
        name="keye_tiny_rl_start",
        data=replace(
            run.data,
            samples=f"{FOLDER}/train.jsonl",
            tokenizer=f"{FOLDER}/tokenizer",
            validation="",
        ),
        training=replace(
            run.training,
            steps=300,
            checkpoint=CheckpointConfig(interval_steps=100),
            validation=replace(run.training.validation, interval_steps=0),
            evaluation=replace(
                run.training.evaluation, samples=f"{FOLDER}/held_out.questions.jsonl"
            ),
        ),
    )


def keye_tiny_rl(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that learns from rewards, for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    start = keye_tiny_rl_start(num_ranks=num_ranks, has_gpu=has_gpu)
    return replace(
        start,
        name="keye_tiny_rl",
        data=replace(start.data, samples=f"{FOLDER}/train.questions.jsonl"),
        training=replace(
            start.training,
            steps=100,
            frozen=("vision", "projector"),  # The dense phase has no indexers.
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2, schedule="constant"),
            checkpoint=CheckpointConfig(
                interval_steps=10,
                weights="runs/keye_tiny_rl_start/checkpoints/step-00000300",
            ),
            evaluation=replace(start.training.evaluation, interval_steps=10),
            # The loss of weighted answers has another meaning in every step.
            health=HealthConfig(spike_score=0.0),
        ),
        rollout=RolloutConfig(max_new_tokens=24, cache_tokens=16_384),
        post_training=PostTrainingConfig(
            kind="gspo",
            prompts_per_step=8,
            answers_per_prompt=8,
            minibatches=2,
            clip_low=3e-3,
            clip_high=4e-3,
            old_log_probs="engine",
        ),
    )


RECIPES = {"keye_tiny_rl_start": keye_tiny_rl_start, "keye_tiny_rl": keye_tiny_rl}
