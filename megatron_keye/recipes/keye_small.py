# SPDX-License-Identifier: Apache-2.0
"""A Keye-VL of 100 million weights that learns from forged clips on one GPU, in minutes.

    megatron-keye forge_video runs/small --samples 16000 --held-out 128 --seconds 7 9 --rate 1 \\
        --plain --variable 0 --words 1 --blinking 0 --size 112 112 --shapes 1 --stay 3 \\
        --per-clip 8 --questions when at describe word --unanswered word --tokenizer
    megatron-keye train keye_small --ranks 1

A frame is 16 vision tokens, a clip's conversation 200 to 250, of which a query sees 64 at most:
about 36 share a row of 8,192. Launches bound a step of this size, not its tokens, and a model
learns to look only after some ten thousand conversations; so they are short, layers few and
experts wide. All sizes are those that the CUDA and Triton operators take. Each clip shows a shape
and a word, each for one to three of its 7 or 8 seconds.

The kind of questions that is held out is "word": "When is the word LEMON shown?". Training asks
when shapes are there ("when"), what is there at some times ("at", which names words among other
things) and what happens ("describe"), never when a word is shown. keye_small_rl learns that from
rewards. tools/learn_small.py does all of it, within ten minutes.
"""

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecodeConfig,
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
    VisionConfig,
    VisionParallel,
)

FOLDER = "runs/small"
"""Where the command above writes."""
HELD_OUT_KIND = "word"
"""The kind of questions that training never asks."""
EVALUATION = f"{FOLDER}/evaluation.jsonl"
"""Questions of the kind "when" and of HELD_OUT_KIND about held-out clips."""
_VOCABULARY = 320
"""Room for the words of the clips above, about 165."""
_VISION_START, _VISION_END, _IMAGE, _VIDEO = range(3, 7)
"""Ids in every tokenizer of forge_video."""
_FRAME_TOKENS = 16
_ROW_TOKENS = 8192


def keye_small(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for the given number of ranks.

    Args:
        num_ranks: All are data-parallel, and encode what they decode.
        has_gpu: Chooses bf16 or fp32.
    """
    return RunConfig(
        name="keye_small",
        model=ModelConfig(
            vision=VisionConfig(
                num_layers=2, hidden_size=384, intermediate_size=1536, num_heads=6
            ),
            decoder=_decoder(),
            image_token_id=_IMAGE,
            video_token_id=_VIDEO,
            vision_start_token_id=_VISION_START,
            vision_end_token_id=_VISION_END,
        ),
        data=DataConfig(
            samples=f"{FOLDER}/train.jsonl",
            row_tokens=_ROW_TOKENS,
            tokenizer=f"{FOLDER}/tokenizer",
            packing_window=64,
            frames=FrameConfig(
                frames_per_second=1.0,
                min_tokens_per_frame=_FRAME_TOKENS,
                max_tokens_per_frame=_FRAME_TOKENS,
            ),
            # Pixels and patches of a clip take 6 ms of one core.
            decode=DecodeConfig(backend="pyav", num_threads=1),
        ),
        parallel=ParallelConfig(
            decoder=DecoderParallel(data=num_ranks),
            # Few large chunks: launches would bound many small ones.
            vision=VisionParallel(chunk_patches=32_768),
        ),
        rollout=RolloutConfig(max_sequences=256, cache_tokens=16 * _ROW_TOKENS),
        training=TrainingConfig(
            steps=1000,
            # One row: reading and decoding its 36 clips takes a thread 0.3 s, as long as a step.
            rows_per_step=num_ranks,
            precision="bf16" if has_gpu else "fp32",
            optimizer=OptimizerConfig(
                learning_rate=6e-4,
                warmup_steps=30,
                vision_rate_multiplier=0.1,
                projector_rate_multiplier=0.2,
            ),
            # Where it is stopped early, rewards start from weights whose scores are known.
            checkpoint=CheckpointConfig(interval_steps=100),
            evaluation=EvaluationConfig(
                samples=EVALUATION,
                task="grounding",
                interval_steps=100,
                num_questions=0,
                max_new_tokens=16,
            ),
        ),
    )


def _decoder() -> DecoderConfig:
    return DecoderConfig(
        num_layers=4,
        hidden_size=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=_VOCABULARY,
        experts=ExpertsConfig(num_experts=8, num_experts_per_token=2, intermediate_size=1792),
        indexer=IndexerConfig(num_heads=4, head_dim=64, top_k=64),
        rope_theta=10_000.0,
        rope_sections=(8, 12, 12),
        init_std=0.03,
    )


RECIPES = {"keye_small": keye_small}
