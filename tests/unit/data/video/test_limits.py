# SPDX-License-Identifier: Apache-2.0
"""What a sample says about rate and size is obeyed within the run's budgets."""

import numpy as np
import pytest

from megatron_keye.config import FrameConfig
from megatron_keye.data.video.frames import choose_frames, image_patch_grid
from megatron_keye.data.video.limits import MediaLimits
from tests.support.clips import tiny_vision

VISION = tiny_vision()
AREA = VISION.token_side_pixels**2
RUN = FrameConfig(max_tokens_per_frame=256, max_tokens_per_video=64 * 40)
TIMES = np.arange(100) / 10


def chosen(**limits: float) -> list[int]:
    asked = MediaLimits(**limits)
    config = asked.of_video(RUN, VISION)
    return choose_frames(TIMES, config, limits=asked).tolist()


def test_rate_and_number_of_frames_are_those_asked_for() -> None:
    assert chosen() == list(range(0, 100, 5))
    assert chosen(fps=1) == list(range(0, 100, 10))
    assert chosen(nframes=1) == [0]
    assert chosen(nframes=4) == [0, 33, 66, 99]
    assert chosen(min_frames=12) == list(range(0, 100, 5))
    assert chosen(fps=0.1, min_frames=4) == [0, 33, 66, 99]
    assert chosen(max_frames=4) == [0, 33, 66, 99]


def test_the_runs_budget_of_a_video_stays() -> None:
    most = RUN.max_tokens_per_video // RUN.min_tokens_per_frame
    for limits in ({"nframes": 99}, {"fps": 10}, {"min_frames": 90}):
        assert len(chosen(**limits)) == most
    assert len(chosen(nframes=99, total_pixels=AREA * 64 * 10)) == 10
    assert len(chosen(nframes=99, min_pixels=AREA)) == 99, "frames may be smaller than the run's"


def test_a_window_limits_a_number_of_frames() -> None:
    asked = MediaLimits(nframes=3)
    found = choose_frames(TIMES, RUN, start_seconds=2.0, end_seconds=3.0, limits=asked)
    assert found.tolist() == [20, 24, 29]
    asked = MediaLimits(nframes=50)
    found = choose_frames(TIMES, RUN, start_seconds=2.0, end_seconds=3.0, limits=asked)
    assert found.tolist() == list(range(20, 30)), "all that there are"


def test_sizes_are_those_asked_for_within_the_runs() -> None:
    def bounds(**limits: int) -> tuple[int, int]:
        config = MediaLimits(**limits).of_video(RUN, VISION)
        return config.min_tokens_per_frame, config.max_tokens_per_frame

    assert bounds() == (64, 256)
    assert bounds(max_pixels=100 * AREA + 1) == (64, 100)
    assert bounds(max_pixels=10 * AREA) == (10, 10)
    assert bounds(max_pixels=9999 * AREA, min_pixels=9000 * AREA) == (256, 256)
    assert bounds(min_pixels=100 * AREA - 1) == (100, 256)
    limits = MediaLimits(max_pixels=6 * AREA)
    side = VISION.token_side_pixels
    assert image_patch_grid(20 * side, 30 * side, limits.of_image(RUN, VISION), VISION) == (4, 6)
    for key in ("max_pixels", "total_pixels"):
        with pytest.raises(ValueError, match=f"'{key}': got {AREA - 1}, expected at least {AREA}"):
            MediaLimits(**{key: AREA - 1}).of_video(RUN, VISION)
