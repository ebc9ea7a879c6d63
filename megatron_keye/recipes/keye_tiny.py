# SPDX-License-Identifier: Apache-2.0
"""A tiny Keye-VL with every part of the released one, for a first run on any machine.

With the real vocabulary and a real video, but small hidden sizes, it learns to answer questions
about a short film clip within minutes on two CPU cores.
"""

from pathlib import Path

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DecoderParallel,
    ExpertsConfig,
    FrameConfig,
    IndexerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
    VisionParallel,
)


def keye_tiny(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run for the given number of ranks.

    Args:
        num_ranks: 1 puts everything on one rank; 2 or 3 have one vision rank, more have two. The
            rest are data-parallel or, if 4 or more and even, also tensor- and expert-parallel.
        has_gpu: Chooses bf16 or fp32.
    """
    parallel = _parallel(num_ranks)
    return RunConfig(
        name="keye_tiny",
        model=ModelConfig(vision=_vision(), decoder=_decoder()),
        data=DataConfig(
            samples=str(Path(__file__).with_suffix(".jsonl")),
            row_tokens=384,
            frames=FrameConfig(min_tokens_per_frame=8, max_tokens_per_frame=16),
        ),
        parallel=parallel,
        training=TrainingConfig(
            # Enough to know the answers of its file by heart.
            steps=130,
            rows_per_step=2 * parallel.decoder.data,
            precision="bf16" if has_gpu else "fp32",
            optimizer=OptimizerConfig(learning_rate=9e-3, min_learning_rate=6e-4, warmup_steps=4),
            checkpoint=CheckpointConfig(interval_steps=50),
        ),
    )


def _vision() -> VisionConfig:
    return VisionConfig(num_layers=2, hidden_size=64, intermediate_size=128, num_heads=4)


def _decoder() -> DecoderConfig:
    return DecoderConfig(
        num_layers=4,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=151_936,
        experts=ExpertsConfig(num_experts=8, num_experts_per_token=2, intermediate_size=64),
        indexer=IndexerConfig(num_heads=4, head_dim=8, top_k=64),
        rope_sections=(2, 2, 4),
    )


def _parallel(num_ranks: int) -> ParallelConfig:
    if num_ranks < 2:
        return ParallelConfig()
    num_vision = 1 if num_ranks < 4 else 2
    tensor = 2 if num_ranks >= 4 and num_ranks % 2 == 0 else 1
    data = (num_ranks - num_vision) // tensor
    return ParallelConfig(
        decoder=DecoderParallel(tensor=tensor, expert=tensor, data=data),
        vision=VisionParallel(placement="dedicated", num_ranks=num_vision),
    )


RECIPES = {"keye_tiny": keye_tiny}
