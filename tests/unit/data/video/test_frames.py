# SPDX-License-Identifier: Apache-2.0
"""Sampling and sizes: what is on screen at each instant, within every budget."""

import numpy as np
import pytest

from megatron_keye.config import FrameConfig
from megatron_keye.data.video.frames import (
    choose_frames,
    frame_patch_grid,
    image_patch_grid,
    plan_video,
)
from megatron_keye.data.video.probe import probe
from megatron_keye.errors import UserError
from tests.support.clips import BIG_BUCK_BUNNY, real_clip, tiny_vision

VISION = tiny_vision()
TWO = FrameConfig()


def test_real_clip_is_sampled_by_its_true_times() -> None:
    plan = plan_video(probe(real_clip(BIG_BUCK_BUNNY)), TWO, VISION)
    assert plan.frame_indices.tolist() == [0, 12, 25, 37, 50, 62, 75, 87, 100, 112, 125]
    np.testing.assert_allclose(plan.times, plan.frame_indices / 25)
    assert plan.patch_grid == (24, 42)


def test_window_leaves_its_end_out() -> None:
    info = probe(real_clip(BIG_BUCK_BUNNY))
    plan = plan_video(info, TWO, VISION, start_seconds=1.0, end_seconds=3.0)
    assert plan.frame_indices.tolist() == [25, 37, 50, 62]


@pytest.mark.parametrize("rate", [0.3, 2.0, 7.0, 100.0])
def test_each_chosen_frame_is_on_screen_at_an_instant(rate: float) -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(0.2, 80)) + 1.5
    chosen = choose_frames(times, FrameConfig(frames_per_second=rate))
    instants = np.arange(times[0], times[-1] + 1e-9, 1 / rate)
    expected = sorted({max(i for i in range(80) if times[i] <= t + 1e-9) for t in instants})
    assert chosen.tolist() == expected


def test_slow_videos_give_each_frame_once() -> None:
    times = np.array([0.0, 1.0, 2.5, 3.1, 9.0])
    assert choose_frames(times, TWO).tolist() == [0, 1, 2, 3, 4]


def test_rounding_of_times_loses_no_frame() -> None:
    times = np.arange(100) * 0.1
    assert times[3] > 3 / 10, "the times do not test rounding"
    assert choose_frames(times, FrameConfig(frames_per_second=10)).tolist() == list(range(100))


@pytest.mark.parametrize("window", [(3.0, 3.0), (5.0, 2.0), (99.0, None), (0.0, -1.0)])
def test_windows_without_frames_are_refused(window: tuple[float, float | None]) -> None:
    with pytest.raises(ValueError, match="holds no frame"):
        choose_frames(np.arange(10.0), TWO, start_seconds=window[0], end_seconds=window[1])


def test_a_longer_video_than_the_stage_allows_is_refused_until_a_window_fits() -> None:
    info, limited = probe(real_clip(BIG_BUCK_BUNNY)), FrameConfig(max_seconds=2.0)
    with pytest.raises(UserError, match=r"bunny\.mp4: 5\.240 s would be shown, expected at most"):
        plan_video(info, limited, VISION)
    with pytest.raises(UserError, match=r"2\.240 s would be shown"):
        plan_video(info, limited, VISION, start_seconds=3.0)
    plan = plan_video(info, limited, VISION, start_seconds=1.0, end_seconds=3.0)
    assert plan.frame_indices.tolist() == [25, 37, 50, 62]
    whole = plan_video(info, FrameConfig(max_seconds=5.24), VISION)
    assert len(whole.frame_indices) == 11


def test_frames_shrink_first_then_fewer_are_chosen() -> None:
    config = FrameConfig(max_tokens_per_video=64 * 100)
    shapes = {}
    for seconds in (10, 25, 40, 49, 500):
        chosen = choose_frames(np.arange(0, seconds, 0.04), config)
        rows, columns = frame_patch_grid(720, 1280, len(chosen), config, VISION)
        tokens = rows * columns // 4
        assert tokens * len(chosen) <= config.max_tokens_per_video
        shapes[seconds] = len(chosen), tokens
    assert [count for count, _ in shapes.values()] == [20, 50, 80, 98, 100]
    sizes = [tokens for _, tokens in shapes.values()]
    assert sizes == sorted(sizes, reverse=True), "longer videos got larger frames"
    assert np.unique(np.diff(choose_frames(np.arange(0, 500, 0.5), config))).tolist() == [10, 11]


def test_released_minimum_is_not_a_hard_floor() -> None:
    assert frame_patch_grid(720, 1280, 2880, TWO, VISION) == (12, 20)


@pytest.mark.parametrize("patch_size", [8, 14])
def test_grids_keep_every_bound(patch_size: int) -> None:
    generator = np.random.default_rng(0)
    vision = tiny_vision(patch_size)
    for _ in range(2000):
        height, width = (int(side) for side in 2 ** generator.uniform(0, 12, 2))
        if max(height, width) > 200 * min(height, width):
            continue
        low, high = np.sort(generator.integers(1, 400, 2)).tolist()
        config = FrameConfig(min_tokens_per_frame=low, max_tokens_per_frame=high)
        rows, columns = frame_patch_grid(height, width, 1, config, vision)
        assert rows % 2 == columns % 2 == 0 < rows * columns
        assert rows * columns // 4 <= high, (height, width, low, high)


def test_halves_round_to_even() -> None:
    free = FrameConfig(min_tokens_per_image=1)
    assert image_patch_grid(28 * 2 + 14, 28 * 3 + 14, free, VISION) == (4, 8)


@pytest.mark.parametrize("size", [(10, 2001), (2001, 10)])
def test_extreme_aspect_ratios_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="200 : 1"):
        image_patch_grid(*size, TWO, VISION)
