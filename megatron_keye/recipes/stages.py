# SPDX-License-Identifier: Apache-2.0
"""The stages of training, from the projector alone to instruction tuning, as recipes of one table.

keye_stage0 to keye_sft are at full size, for 64 GPUs of 80 GB in nodes of 8; keye_tiny_stage0 to
keye_tiny_sft walk the same way with the model and data of keye_tiny. Each starts from the
last checkpoint of the one before (training.checkpoint.weights; `megatron-keye run_stages`).

A comment beside a number names its source. paper: the report of Keye-VL-2.0 (arXiv 2606.10651).
V3.2: that of DeepSeek-V3.2, whose indexer is trained alike, with rows of 128K. ours: neither says.
"""

from dataclasses import dataclass, replace
from functools import partial

from megatron_keye.config import DataConfig, OptimizerConfig, RunConfig
from megatron_keye.config.parts import Part
from megatron_keye.config.training import Phase
from megatron_keye.recipes.keye_30b_a3b import keye_30b_a3b
from megatron_keye.recipes.keye_tiny import keye_tiny

_K, _BILLION = 1024, 10**9
_CONTEXT_RANK_TOKENS = 32 * _K
"""Row tokens of a context-parallel rank, shared by two tensor-parallel ones, as in keye_30b_a3b.
Shorter rows leave context ranks without work, so these become replicas."""
_TINY_STEPS = 8
_TINY_ROW, _TINY_LONG_ROW = 384, 768


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what learns from which rows, and how fast."""

    name: str
    """Name behind the model's."""
    phase: Phase
    """Kind of attention, and whether indexers alone learn."""
    frozen: tuple[Part, ...] = ()
    """Parts of the phase that do not learn."""
    row_tokens: int
    """Context."""
    num_tokens: int
    """Tokens of all rows of the stage."""
    rows_per_step: int
    """Global batch size."""
    max_seconds: float
    """Longest video."""
    max_tokens_per_video: int
    """Most vision tokens of a video."""
    max_tokens_per_image: int = 20_480  # the released preprocessing
    """Most vision tokens of an image."""
    learning_rate: float
    """Peak."""
    min_learning_rate: float
    """At the end of the stage."""
    warmup_steps: int
    """Steps of a growing learning rate."""
    samples: str
    """Where a user's data is expected; set data.samples for another place."""


STAGES = (
    Stage(
        name="stage0",
        phase="dense",
        frozen=("vision", "decoder"),  # paper: the projector alone learns
        row_tokens=8 * _K,  # paper
        num_tokens=4 * _BILLION,  # paper
        rows_per_step=512,  # ours: 4.2M tokens
        max_seconds=15.0,  # ours: as stage 1; the paper has no video here
        max_tokens_per_video=4 * _K,  # ours: half a row
        max_tokens_per_image=6 * _K,  # ours: leaves a row room for the text
        learning_rate=1e-3,  # ours
        min_learning_rate=1e-4,  # ours
        warmup_steps=50,  # ours
        samples="data/stage0.jsonl",
    ),
    Stage(
        name="stage1",
        phase="dense",  # paper: all learns; that attention is dense before 256K is ours
        row_tokens=32 * _K,  # paper
        num_tokens=1_000 * _BILLION,  # paper
        rows_per_step=256,  # ours: 8.4M tokens
        max_seconds=15.0,  # paper: pieces, each with its caption (megatron-keye interleave)
        max_tokens_per_video=24 * _K,  # paper
        learning_rate=1e-4,  # ours
        min_learning_rate=5e-5,  # ours
        warmup_steps=2_000,  # ours
        samples="data/stage1.jsonl",
    ),
    Stage(
        name="stage2",
        phase="dense",  # as stage 1
        row_tokens=64 * _K,  # paper
        num_tokens=2_000 * _BILLION,  # paper
        rows_per_step=128,  # ours: 8.4M tokens
        max_seconds=900.0,  # paper
        max_tokens_per_video=52 * _K,  # paper: 64K; ours: times and text fill the row's rest
        learning_rate=5e-5,  # ours
        min_learning_rate=2e-5,  # ours
        warmup_steps=500,  # ours
        samples="data/stage2.jsonl",
    ),
    Stage(
        name="stage3",
        phase="dense",  # ours: the paper does not say where in stage 3 attention becomes sparse
        row_tokens=256 * _K,  # paper
        num_tokens=450 * _BILLION,  # paper: 500 billion; ours: without those of the adaptation
        rows_per_step=32,  # ours: 8.4M tokens
        max_seconds=7_200.0,  # paper
        max_tokens_per_video=180 * _K,  # paper
        learning_rate=2e-5,  # ours
        min_learning_rate=7.3e-6,  # ours: where the adaptation goes on
        warmup_steps=500,  # ours
        samples="data/long.jsonl=1,data/short.jsonl=1",  # paper: 1:1; by samples: ours
    ),
    Stage(
        name="indexer_warmup",
        phase="indexer_warmup",  # paper
        row_tokens=256 * _K,  # ours: as stage 3
        num_tokens=2 * _BILLION,  # paper
        rows_per_step=8,  # V3.2: 2.1M tokens
        max_seconds=7_200.0,  # ours: as stage 3
        max_tokens_per_video=180 * _K,  # ours: as stage 3
        learning_rate=1e-3,  # V3.2
        min_learning_rate=1e-3,  # ours: constant
        warmup_steps=0,  # ours
        samples="data/long.jsonl=1,data/short.jsonl=1",  # ours: as stage 3
    ),
    Stage(
        name="sparse_adaptation",
        phase="sparse",  # paper: all learns
        row_tokens=256 * _K,  # paper
        num_tokens=50 * _BILLION,  # ours
        rows_per_step=240,  # V3.2: 62.9M tokens
        max_seconds=7_200.0,  # paper: within stage 3
        max_tokens_per_video=180 * _K,  # paper: within stage 3
        learning_rate=7.3e-6,  # V3.2
        min_learning_rate=7.3e-6,  # V3.2
        warmup_steps=20,  # ours
        samples="data/long.jsonl=1,data/short.jsonl=1",  # paper: within stage 3
    ),
    Stage(
        name="sft",
        phase="sparse",  # ours: as released
        row_tokens=256 * _K,  # ours
        num_tokens=500 * _BILLION,  # paper
        rows_per_step=32,  # ours: 8.4M tokens
        max_seconds=7_200.0,  # ours: as stage 3
        max_tokens_per_video=180 * _K,  # ours: as stage 3
        learning_rate=1e-5,  # ours
        min_learning_rate=1e-6,  # ours
        warmup_steps=500,  # ours
        samples="data/sft.jsonl=3,data/sft_text.jsonl=2",  # paper: 40 % text; by samples: ours
    ),
)
"""In the order in which they follow each other."""


def full_size(stage: Stage, *, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return a stage of Keye-VL-2.0-30B-A3B.

    Args:
        stage: One of STAGES.
        num_ranks: A multiple of 64; the global batch stays the same.
        has_gpu: Chooses bf16 or fp32.
    """
    base = keye_30b_a3b(num_ranks=num_ranks, has_gpu=has_gpu)
    degrees = base.parallel.decoder
    context = max(1, stage.row_tokens // _CONTEXT_RANK_TOKENS)
    degrees = replace(degrees, context=context, data=degrees.context * degrees.data // context)
    optimizer = OptimizerConfig(
        learning_rate=stage.learning_rate,
        min_learning_rate=stage.min_learning_rate,
        warmup_steps=stage.warmup_steps,
    )
    # A window, so that rows are full.
    data = replace(base.data, samples=stage.samples, packing_window=64)
    return replace(
        base,
        name=f"keye_{stage.name}",
        data=_rows_of(stage, data, stage.row_tokens),
        parallel=replace(base.parallel, decoder=degrees),
        training=replace(
            base.training,
            phase=stage.phase,
            frozen=stage.frozen,
            steps=stage.num_tokens // (stage.row_tokens * stage.rows_per_step),
            rows_per_step=stage.rows_per_step,
            optimizer=optimizer,
        ),
    )


def tiny(stage: Stage, *, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return a stage of the tiny model: a few steps on the demo's clip.

    Args:
        stage: One of STAGES.
        num_ranks: As for keye_tiny.
        has_gpu: Chooses bf16 or fp32.
    """
    base = keye_tiny(num_ranks=num_ranks, has_gpu=has_gpu)
    row_tokens = _TINY_LONG_ROW if stage.row_tokens == STAGES[-1].row_tokens else _TINY_ROW
    training, half = base.training, _TINY_STEPS // 2
    return replace(
        base,
        name=f"keye_tiny_{stage.name}",
        data=_rows_of(stage, base.data, row_tokens),
        training=replace(
            training,
            phase=stage.phase,
            frozen=stage.frozen,
            steps=_TINY_STEPS,
            # A third of the demo's rate, which is for many more steps.
            optimizer=replace(
                training.optimizer, learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2
            ),
            checkpoint=replace(training.checkpoint, interval_steps=half),
        ),
    )


def _rows_of(stage: Stage, data: DataConfig, row_tokens: int) -> DataConfig:
    """Return the data with rows of so many tokens and the stage's limits of pictures."""
    frames = replace(
        data.frames,
        max_seconds=stage.max_seconds,
        max_tokens_per_video=stage.max_tokens_per_video,
        max_tokens_per_image=stage.max_tokens_per_image,
    )
    return replace(data, row_tokens=row_tokens, frames=frames)


CHAINS = {
    "keye": tuple(f"keye_{stage.name}" for stage in STAGES),
    "keye_tiny": tuple(f"keye_tiny_{stage.name}" for stage in STAGES),
}
"""The recipes of all stages of a model, in order, by the model's name."""

RECIPES = {f"keye_{stage.name}": partial(full_size, stage) for stage in STAGES} | {
    f"keye_tiny_{stage.name}": partial(tiny, stage) for stage in STAGES
}
