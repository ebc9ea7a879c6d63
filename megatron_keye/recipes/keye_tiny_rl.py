# SPDX-License-Identifier: Apache-2.0
"""A tiny Keye-VL that learns from rewards when something is on the screen, on a CPU.

    grep '"kind": "when"' runs/grounding/train.questions.jsonl > runs/grounding/when.jsonl
    megatron-keye train keye_tiny_grounding --ranks 1 --set training.stop_after_step=200
    megatron-keye train keye_tiny_rl --ranks 1
    megatron-keye evaluate keye_tiny_rl --task grounding --out runs/rl_scores \\
        --samples runs/grounding/held_out.questions.jsonl --weights runs/keye_tiny_rl

The clips are those of keye_tiny_grounding, whose file has the command that forges them. Its first
third teaches the form of an answer and a little of when: one drawn answer in six is right. Rewards
of its own answers take the model further; the ViT and the projector are frozen then. With a rate
above twice this one, answers become alike before their rewards tell what to look at.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    HealthConfig,
    OptimizerConfig,
    PostTrainingConfig,
    RolloutConfig,
    RunConfig,
    ValidationConfig,
)
from megatron_keye.recipes.keye_tiny_grounding import FOLDER, keye_tiny_grounding


def keye_tiny_rl(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that learns from rewards, for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    start = keye_tiny_grounding(num_ranks=num_ranks, has_gpu=has_gpu)
    return replace(
        start,
        name="keye_tiny_rl",
        data=replace(start.data, samples=f"{FOLDER}/when.jsonl", validation=""),
        training=replace(
            start.training,
            steps=160,
            frozen=("vision", "projector"),  # The dense phase has no indexers.
            optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=5, schedule="constant"),
            checkpoint=CheckpointConfig(
                interval_steps=20,
                weights="runs/keye_tiny_grounding/checkpoints/step-00000200",
            ),
            validation=ValidationConfig(interval_steps=0),
            evaluation=replace(start.training.evaluation, interval_steps=20),
            # The loss of weighted answers has another meaning in every step.
            health=HealthConfig(spike_score=0.0),
        ),
        rollout=RolloutConfig(max_new_tokens=16, cache_tokens=16_384),
        post_training=PostTrainingConfig(
            kind="gspo",
            prompts_per_step=32,
            answers_per_prompt=8,
            minibatches=2,
            clip_low=3e-2,
            clip_high=4e-2,
            old_log_probs="engine",
        ),
    )


RECIPES = {"keye_tiny_rl": keye_tiny_rl}
