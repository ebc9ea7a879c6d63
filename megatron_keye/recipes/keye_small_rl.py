# SPDX-License-Identifier: Apache-2.0
"""keye_small learns from rewards to answer a kind of question that it was never taught.

    grep '"kind": "word"' runs/small/train.questions.jsonl > runs/small/word.jsonl
    megatron-keye train keye_small_rl --ranks 1

The clips and the model are those of keye_small, whose file has the command that forges them and
says which kind is held out. Asked for it, the model names times, mostly of what it was taught to
look for, which overlap with the word's by chance; these answers' rewards are all that it learns
from. The ViT and the projector are frozen.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    HealthConfig,
    OptimizerConfig,
    PostTrainingConfig,
    RunConfig,
)
from megatron_keye.recipes.keye_small import FOLDER, HELD_OUT_KIND, keye_small


def keye_small_rl(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that learns from rewards, for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    start = keye_small(num_ranks=num_ranks, has_gpu=has_gpu)
    return replace(
        start,
        name="keye_small_rl",
        data=replace(start.data, samples=f"{FOLDER}/{HELD_OUT_KIND}.jsonl"),
        training=replace(
            start.training,
            steps=120,
            frozen=("vision", "projector"),
            optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=5, schedule="constant"),
            checkpoint=CheckpointConfig(
                interval_steps=50,
                weights=f"runs/keye_small/checkpoints/step-{start.training.steps:08}",
            ),
            evaluation=replace(start.training.evaluation, interval_steps=20),
            # The loss of weighted answers has another meaning in every step.
            health=HealthConfig(spike_score=0.0),
        ),
        rollout=replace(start.rollout, max_new_tokens=16),
        post_training=PostTrainingConfig(
            kind="gspo",
            prompts_per_step=32,
            answers_per_prompt=8,
            minibatches=2,
            clip_low=3e-2,
            clip_high=4e-2,
            # In bf16 training and generation differ by more than the width of the defaults, on
            # answers of four tokens.
            gate_low=0.8,
            gate_high=1.25,
            max_log_prob_error=0.2,
        ),
    )


RECIPES = {"keye_small_rl": keye_small_rl}
