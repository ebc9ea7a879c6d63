# SPDX-License-Identifier: Apache-2.0
"""What a sample says about the frames and the size of its media, within the run's budgets."""

import math
from dataclasses import dataclass, replace

from megatron_keye.config import FrameConfig, VisionConfig
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Limits of one image or video, with the names and meanings of qwen-vl-utils; None: the run's.

    The run's budgets stay: a sample can ask for less than `data.frames` allows, never for more.
    """

    fps: float | None = None
    """Frames sampled per second; not together with nframes."""
    nframes: int | None = None
    """Frames sampled, evenly spaced over the window; all if it has fewer."""
    min_frames: int | None = None
    """Where fps gives fewer frames, so many are sampled instead, evenly spaced."""
    max_frames: int | None = None
    """Where fps gives more frames, so many are sampled instead, evenly spaced."""
    min_pixels: int | None = None
    """Smaller images or frames are enlarged to about this many pixels."""
    max_pixels: int | None = None
    """Larger images or frames are shrunk to at most this many pixels."""
    total_pixels: int | None = None
    """Most pixels of all frames of a video together."""

    def __post_init__(self) -> None:
        if self.nframes is not None:
            others = ("fps", "min_frames", "max_frames")
            self._refuse_together("nframes", *(n for n in others if getattr(self, n) is not None))
        for kind in ("frames", "pixels"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low is not None and high is not None and low > high:
                raise UserError(
                    f"got 'min_{kind}': {low} and 'max_{kind}': {high}, expected the first to be "
                    "at most the second"
                )

    def _refuse_together(self, name: str, *others: str) -> None:
        if others:
            raise UserError(
                f"got {name!r} and {others[0]!r}, expected one of them: either decides how many "
                "frames there are"
            )

    def of_image(self, config: FrameConfig, vision: VisionConfig) -> FrameConfig:
        """Return the run's settings within these limits, for an image.

        Raises:
            UserError: When max_pixels is below one token.
        """
        low, high = self._tokens(config.min_tokens_per_image, config.max_tokens_per_image, vision)
        return replace(config, min_tokens_per_image=low, max_tokens_per_image=high)

    def of_video(
        self, config: FrameConfig, vision: VisionConfig, *, default_rate: float | None = None
    ) -> FrameConfig:
        """Return the run's settings within these limits, for a video.

        Args:
            config: The run's.
            vision: Patch and merge size.
            default_rate: Frames per second without `fps`; None for the run's.

        Raises:
            UserError: When max_pixels or total_pixels is below one token.
        """
        low, high = self._tokens(config.min_tokens_per_frame, config.max_tokens_per_frame, vision)
        total = config.max_tokens_per_video
        if self.total_pixels is not None:
            total = min(total, _whole_tokens(self.total_pixels, "total_pixels", vision))
        return replace(
            config,
            frames_per_second=self.fps or default_rate or config.frames_per_second,
            min_tokens_per_frame=min(low, total),
            max_tokens_per_frame=high,
            max_tokens_per_video=total,
        )

    def num_frames(self, num_sampled: int) -> int:
        """Return how many frames are wanted where the rate gives `num_sampled`."""
        if self.nframes is not None:
            return self.nframes
        wanted = max(num_sampled, self.min_frames or 0)
        return wanted if self.max_frames is None else min(wanted, self.max_frames)

    def _tokens(self, low: int, high: int, vision: VisionConfig) -> tuple[int, int]:
        """Return least and most tokens of one image or frame."""
        most = high
        if self.max_pixels is not None:
            most = min(high, _whole_tokens(self.max_pixels, "max_pixels", vision))
        if self.min_pixels is not None:
            low = math.ceil(self.min_pixels / vision.token_side_pixels**2)
        return min(low, most), most


def _whole_tokens(pixels: int, name: str, vision: VisionConfig) -> int:
    """Return how many tokens fit into so many pixels."""
    area = vision.token_side_pixels**2
    if pixels < area:
        raise UserError(f"{name!r}: got {pixels}, expected at least {area}, one token")
    return pixels // area
