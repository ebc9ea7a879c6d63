# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video the model sees and at what size, decided without decoding.

Everything downstream (token counts, chunks, who encodes what) is planned from this decision, so
it depends on the container's times and the configuration alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config import FrameConfig, VisionConfig
from megatron_keye.data.video.limits import MediaLimits
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

MAX_ASPECT_RATIO = 200
"""Longest side over shortest side that the released preprocessing accepts."""

# Times come from integer ticks through float64; without slack a frame due exactly at an instant
# could count as later than it.
_SLACK_SECONDS = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoPlan:
    """The frames of one video that the model sees."""

    frame_indices: NDArray[np.int64]
    """Indices in presentation order, ascending, without repeats [frames]."""
    times: NDArray[np.float64]
    """True presentation time of each, in seconds [frames]."""
    patch_grid: tuple[int, int]
    """Patches down and across of each frame."""


def plan_video(
    info: VideoInfo,
    config: FrameConfig,
    vision: VisionConfig,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits | None = None,
) -> VideoPlan:
    """Decide the frames and their size.

    Args:
        info: What `probe` returned.
        config: Rate and budgets.
        vision: Patch and merge size.
        start_seconds: Where the window starts; None for the video's start.
        end_seconds: Where the window ends, itself left out; None for the video's end.
        limits: What the sample says about rate and size; None for nothing.

    Raises:
        UserError: For a window without frames, one that exceeds max_seconds or a refused aspect
            ratio, naming the file.
    """
    limits = limits or MediaLimits()
    try:
        config = limits.of_video(config, vision)
        chosen = choose_frames(
            info.times,
            config,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
            limits=limits,
        )
        patch_grid = frame_patch_grid(info.height, info.width, len(chosen), config, vision)
    except UserError as error:
        raise UserError(f"{info.path}: {error}") from error
    return VideoPlan(frame_indices=chosen, times=info.times[chosen], patch_grid=patch_grid)


def choose_frames(
    times: NDArray[np.float64],
    config: FrameConfig,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits | None = None,
) -> NDArray[np.int64]:
    """Choose the frame that is on screen at each sampling instant, each frame once.

    Instants are 1 / frames_per_second apart, from the window's start; a frame stays on screen
    until the next one comes, whatever rate the container claims. When more frames are due than
    max_tokens_per_video holds at min_tokens_per_frame, evenly spaced ones of them are kept.

    Args:
        times: Presentation times in seconds, ascending [frames].
        config: Rate and budgets.
        start_seconds: First instant; None or anything earlier means the first frame's time.
        end_seconds: Instants come before this; None lets the last frame's time be the last.
        limits: May ask for more or fewer instants, evenly spaced over the window.

    Returns:
        int64 indices into `times`, ascending, at least one.

    Raises:
        UserError: For a window that is empty, lies outside the video or exceeds max_seconds.
    """
    first, last = float(times[0]), float(times[-1])
    start = first if start_seconds is None else max(first, start_seconds)
    end = last + 2 * _SLACK_SECONDS if end_seconds is None else end_seconds
    if not (start <= last + _SLACK_SECONDS and start < end):
        raise UserError(
            f"the window {start_seconds} to {end_seconds} s holds no frame, expected one that "
            f"meets {first:.3f} to {last:.3f} s; correct start and end"
        )
    stop = min(end - _SLACK_SECONDS, last + _SLACK_SECONDS)
    if config.max_seconds and stop - start > config.max_seconds + _SLACK_SECONDS:
        raise UserError(
            f"{stop - start:.3f} s would be shown, expected at most data.frames.max_seconds = "
            f"{config.max_seconds:g}; give the video a start and an end, or cut it into pieces "
            "(megatron-keye interleave)"
        )
    num_instants = int(max(0.0, stop - start) * config.frames_per_second) + 1
    num_wanted = limits.num_frames(num_instants) if limits is not None else num_instants
    if num_wanted == num_instants:
        instants = start + np.arange(num_instants) / config.frames_per_second
    else:
        # The last one is inside the window also after the slack that is added below.
        instants = np.linspace(start, max(start, stop - 1.5 * _SLACK_SECONDS), num_wanted)
    on_screen = np.searchsorted(times, instants + _SLACK_SECONDS, side="right") - 1
    chosen = np.unique(on_screen).astype(np.int64)
    most = config.max_tokens_per_video // config.min_tokens_per_frame
    if len(chosen) > most:
        chosen = chosen[np.linspace(0, len(chosen) - 1, most).round().astype(np.int64)]
    return chosen


def frame_patch_grid(
    height: int, width: int, num_frames: int, config: FrameConfig, vision: VisionConfig
) -> tuple[int, int]:
    """Return patches (down, across) of each of `num_frames` equal frames of one video.

    Args:
        height: Pixels down of the upright frame.
        width: Pixels across.
        num_frames: Frames that share max_tokens_per_video; as many as `choose_frames` gives.
        config: Budgets.
        vision: Patch and merge size.

    Raises:
        UserError: For an aspect ratio above 200.
    """
    share = config.max_tokens_per_video // num_frames
    low = config.min_tokens_per_frame
    return _patch_grid(
        height, width, low, max(low, min(config.max_tokens_per_frame, share)), vision
    )


def image_patch_grid(
    height: int, width: int, config: FrameConfig, vision: VisionConfig
) -> tuple[int, int]:
    """Return patches (down, across) of a still image; the rest as `frame_patch_grid`."""
    low, high = config.min_tokens_per_image, config.max_tokens_per_image
    return _patch_grid(height, width, low, high, vision)


def _patch_grid(
    height: int, width: int, low: int, high: int, vision: VisionConfig
) -> tuple[int, int]:
    """Fit an image or frame into `low` to `high` tokens; `high` is kept at the cost of `low`."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(
            f"the image or frame is {height} x {width} pixels, expected sides of at most "
            f"{MAX_ASPECT_RATIO} : 1; crop it"
        )
    side = vision.token_side_pixels
    if height < side:
        height, width = side, round(width * side / height)
    if width < side:
        height, width = round(height * side / width), side
    down, across = height / side, width / side
    # round() takes halves to even, as the released preprocessing does.
    rows, columns = round(down), round(across)
    if rows * columns < low:
        grow = (low / (down * across)) ** 0.5
        rows, columns = int(np.ceil(down * grow)), int(np.ceil(across * grow))
    if rows * columns > high:
        shrink = (high / (down * across)) ** 0.5
        rows, columns = max(1, int(down * shrink)), max(1, int(across * shrink))
        # A side held up at one token can leave the other too long.
        columns = min(columns, max(1, high // rows))
        rows = min(rows, high // columns)
    return rows * vision.merge_size, columns * vision.merge_size
