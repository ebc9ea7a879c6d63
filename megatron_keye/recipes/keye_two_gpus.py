# SPDX-License-Identifier: Apache-2.0
"""The full-size ViT and four full-size decoder layers on two large GPUs, for measurements.

One vision rank and one decoder rank; a row of 32K tokens holds a minute of 720p video.
docs/overlap.md has the commands that make the video and draw the timeline.
"""

from dataclasses import replace

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderParallel,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionParallel,
)
from megatron_keye.recipes.keye_30b_a3b import keye_30b_a3b


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


RECIPES = {"keye_two_gpus": keye_two_gpus}
