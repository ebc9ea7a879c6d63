# SPDX-License-Identifier: Apache-2.0
"""A tiny Keye-VL that learns on forged clips when something is on the screen, on a CPU.

    megatron-keye forge_video runs/grounding --samples 4000 --held-out 128 --seconds 7 9 \\
        --rate 1 --plain --variable 0 --words 0 --blinking 0 --size 28 28 --shapes 2 --stay 1 \\
        --questions when at --tokenizer
    megatron-keye train keye_tiny_grounding --ranks 1
    megatron-keye evaluate keye_tiny_grounding --task grounding --out runs/grounding_scores \\
        --samples runs/grounding/held_out.questions.jsonl --weights runs/keye_tiny_grounding

A frame is one vision token and its time one word, which is also a word of the answers; so each
time of an answer stands beside one of the frames, and the model has to find which. "when" asks for
that; "at" asks for many frames, from which it first learns to look. Each shape is shown for one of
7 or 8 seconds, so that an answer that looks at nothing scores below 0.2. One that finds a frame
with a shape, whichever it is, is right for each clip of one shape and for half of the others.
"""

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DecoderParallel,
    EvaluationConfig,
    ExpertsConfig,
    FrameConfig,
    IndexerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    VisionConfig,
)

FOLDER = "runs/grounding"
"""Where the command above writes."""
_VOCABULARY = 160
"""Room for the words of the clips above, about 140."""
_VISION_START, _VISION_END, _IMAGE, _VIDEO = range(3, 7)
"""Ids in every tokenizer of forge_video."""


def keye_tiny_grounding(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    return RunConfig(
        name="keye_tiny_grounding",
        model=ModelConfig(
            vision=VisionConfig(num_layers=1, hidden_size=64, intermediate_size=128, num_heads=4),
            decoder=_decoder(),
            image_token_id=_IMAGE,
            video_token_id=_VIDEO,
            vision_start_token_id=_VISION_START,
            vision_end_token_id=_VISION_END,
        ),
        data=DataConfig(
            samples=f"{FOLDER}/train.jsonl",
            row_tokens=8192 if has_gpu else 192,
            tokenizer=f"{FOLDER}/tokenizer",
            validation=f"{FOLDER}/held_out.jsonl",
            packing_window=64,
            frames=FrameConfig(
                frames_per_second=1.0, min_tokens_per_frame=1, max_tokens_per_frame=1
            ),
        ),
        parallel=ParallelConfig(decoder=DecoderParallel(data=num_ranks)),
        # Prompts of about 60 tokens; a CPU's attention takes the square of a row's length.
        rollout=RolloutConfig(prefill_tokens=8192 if has_gpu else 1024),
        training=TrainingConfig(
            steps=600,
            # A GPU wants many tokens at once; on a CPU more steps of few short rows teach more.
            rows_per_step=num_ranks if has_gpu else 8 * num_ranks,
            # Documents are shorter than top-k, so that sparse attention would see the same keys.
            phase="dense",
            precision="bf16" if has_gpu else "fp32",
            optimizer=OptimizerConfig(
                learning_rate=4e-3,
                warmup_steps=30,
                # The tower's weights begin a third as large as the decoder's, and its features
                # tell colours apart from the start.
                vision_rate_multiplier=0.3,
                projector_rate_multiplier=0.3,
            ),
            checkpoint=CheckpointConfig(interval_steps=100),
            validation=ValidationConfig(interval_steps=100),
            evaluation=EvaluationConfig(
                samples=f"{FOLDER}/held_out.questions.jsonl",
                task="grounding",
                interval_steps=50,
                num_questions=0,
                max_new_tokens=16,
            ),
        ),
    )


def _decoder() -> DecoderConfig:
    return DecoderConfig(
        num_layers=3,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        # Queries and keys are normed: a logit is the square root of this at most.
        head_dim=64,
        vocab_size=_VOCABULARY,
        experts=ExpertsConfig(num_experts=4, num_experts_per_token=2, intermediate_size=128),
        indexer=IndexerConfig(num_heads=4, head_dim=16, top_k=1024),
        rope_theta=10_000.0,
        rope_sections=(8, 12, 12),
        init_std=0.06,
    )


RECIPES = {"keye_tiny_grounding": keye_tiny_grounding}
