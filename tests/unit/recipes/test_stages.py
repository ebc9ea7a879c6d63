# SPDX-License-Identifier: Apache-2.0
"""The recipes of the stages follow their table, at full size and tiny."""

import pytest

from megatron_keye.estimate.ranks import plan_ranks
from megatron_keye.recipes import load_recipe
from megatron_keye.recipes.stages import CHAINS, STAGES, Stage

GPU_GIB = 75
"""An 80 GB GPU without CUDA's and NCCL's own memory."""


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
@pytest.mark.parametrize("num_ranks", [64, 128])
def test_a_full_stage_sees_its_tokens_and_fits_its_gpus(stage: Stage, num_ranks: int) -> None:
    run = load_recipe(f"keye_{stage.name}")(num_ranks=num_ranks, has_gpu=True)
    run.check_num_ranks(num_ranks)
    tokens_per_step = run.training.rows_per_step * run.data.row_tokens
    left = stage.num_tokens - run.training.steps * tokens_per_step
    assert 0 <= left < tokens_per_step
    ranks = plan_ranks(run, None)
    assert max(sum(rank.memory.values()) for rank in ranks) < GPU_GIB


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_one_video_leaves_room_in_its_row(stage: Stage) -> None:
    frames = load_recipe(f"keye_{stage.name}")(num_ranks=64, has_gpu=True).data.frames
    # Brackets and a time such as <7199.5 seconds> are eleven tokens.
    most = frames.max_tokens_per_video // frames.min_tokens_per_frame
    assert frames.max_tokens_per_video + 11 * most < stage.row_tokens
    assert frames.max_tokens_per_image < stage.row_tokens


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_tiny_stage_differs_in_size_alone(stage: Stage) -> None:
    full = load_recipe(f"keye_{stage.name}")(num_ranks=64, has_gpu=True)
    tiny = load_recipe(f"keye_tiny_{stage.name}")(num_ranks=1, has_gpu=False)
    assert tiny.training.trained_parts == full.training.trained_parts
    assert tiny.training.phase == full.training.phase
    assert tiny.data.frames.max_seconds == full.data.frames.max_seconds


def test_each_part_learns_where_the_paper_says() -> None:
    runs = [load_recipe(name)(num_ranks=64, has_gpu=True) for name in CHAINS["keye"]]
    everything = ("vision", "projector", "decoder")
    assert [run.training.trained_parts for run in runs] == [
        ("projector",),
        *[everything] * 3,
        ("indexer",),
        *[(*everything, "indexer")] * 2,
    ]
    assert [run.data.row_tokens // 1024 for run in runs] == [8, 32, 64, *[256] * 4]
