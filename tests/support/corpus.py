# SPDX-License-Identifier: Apache-2.0
"""Every codec that FFmpeg in PyAV can write, for every container that takes it.

Groups of pictures are short and long, open and closed, with and without frames that are stored
before their turn.
"""

from dataclasses import dataclass, field
from pathlib import Path

import av

from tests.support.clips import make_clip

CONTAINERS = (
    *("mp4", "mov", "m4v", "3gp", "mkv", "webm", "ts", "m2ts", "mpg", "vob", "avi", "flv", "ogv"),
    *("asf", "wmv", "nut", "mxf", "wtv", "ivf", "gif", "apng", "webp", "h264", "hevc", "m2v"),
)
_ISO = "mp4 mov m4v 3gp"
_QUIET = "log-level=none"


@dataclass(frozen=True)
class Kind:
    """A codec with the options of its encoder."""

    codec: str
    """FFmpeg's name of the encoder."""
    accepted: str
    """Containers in which its clips can be trained on; all others refuse it when preparing."""
    options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"

    def write(self, path: Path, num_frames: int, scale: int = 1) -> bool:
        """Write a numbered clip; return whether the container takes the codec.

        Args:
            path: File; its suffix chooses the container.
            num_frames: Frames.
            scale: Factor by which frames of 48 x 128 are enlarged.
        """
        try:
            make_clip(
                path,
                num_frames,
                scale=scale,
                codec=self.codec,
                options=self.options,
                pixel_format=self.pixel_format,
            )
        except (av.FFmpegError, ValueError):
            path.unlink(missing_ok=True)
            return False
        return True


def _x264(gop: int, more: str = "", b_frames: int = 2) -> dict[str, str]:
    return {
        "g": str(gop),
        "bf": str(b_frames),
        "preset": "veryfast",
        "x264-params": f"b-adapt=0:scenecut=0{more}",
    }


def _x265(gop: int, more: str = "") -> dict[str, str]:
    parameters = f"{_QUIET}:bframes=3{more}"
    return {"g": str(gop), "preset": "ultrafast", "x265-params": parameters}


_REORDERED = f"{_ISO} mkv ts m2ts flv nut wtv"
_VP = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
_STORED = "avi asf wmv nut"
KINDS = {
    "h264": Kind("libx264", _REORDERED, _x264(12)),
    "h264 long": Kind("libx264", _REORDERED, _x264(250)),
    "h264 open": Kind("libx264", _REORDERED, _x264(12, ":open-gop=1")),
    "h264 pyramid": Kind("libx264", _REORDERED, _x264(9, ":open-gop=1:b-pyramid=2", 5)),
    "h264 refresh": Kind("libx264", _REORDERED, _x264(20, ":intra-refresh=1")),
    "h264 in order": Kind("libx264", f"{_REORDERED} mxf {_STORED}", _x264(12, b_frames=0)),
    "hevc": Kind("libx265", "mp4 mov mkv ts m2ts flv nut", _x265(12)),
    "hevc closed": Kind("libx265", "mp4 mov mkv ts m2ts flv nut", _x265(12, ":open-gop=0")),
    "mpeg4": Kind("mpeg4", f"{_ISO} mkv ts m2ts nut wtv", {"g": "12", "bf": "2"}),
    "mpeg4 in order": Kind("mpeg4", f"{_ISO} mkv ts m2ts wtv {_STORED}", {"g": "12"}),
    "mpeg2": Kind("mpeg2video", "mp4 mov mkv ts m2ts mpg vob nut mxf wtv", {"g": "12", "bf": "2"}),
    "mpeg2 closed": Kind(
        "mpeg2video",
        "mp4 mov mkv ts m2ts mpg vob nut mxf wtv",
        {"g": "12", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"},
    ),
    "mpeg1": Kind("mpeg1video", "mp4 mov mkv ts m2ts mpg vob nut wtv", {"g": "12", "bf": "2"}),
    "vp8": Kind(
        "libvpx",
        f"mkv webm ogv ivf wtv {_STORED}",
        {**_VP, "auto-alt-ref": "1", "lag-in-frames": "10"},
    ),
    "vp9": Kind("libvpx-vp9", f"mp4 mkv webm flv ivf wtv {_STORED}", _VP),
    "av1": Kind(
        "libsvtav1",
        f"mp4 mkv webm flv ivf wtv {_STORED}",
        {"g": "12", "preset": "12", "crf": "10"},
    ),
    "h263": Kind("h263p", f"wtv {_STORED}", {"g": "12"}),
    "flv1": Kind("flv", f"flv wtv {_STORED}", {"g": "12"}),
    "wmv1": Kind("wmv1", f"wtv {_STORED}", {"g": "12"}),
    "wmv2": Kind("wmv2", _STORED, {"g": "12"}),
    "msmpeg4": Kind("msmpeg4", f"mov mkv wtv {_STORED}", {"g": "12"}),
    "snow": Kind("snow", f"mkv wtv {_STORED}", {"g": "12"}),
    "ffv1": Kind("ffv1", f"mp4 mkv mxf {_STORED}", {"g": "12"}),
    "mjpeg": Kind("mjpeg", f"mp4 mov mkv {_STORED}", pixel_format="yuvj420p"),
    "prores": Kind("prores", "mov mkv mxf", pixel_format="yuv422p10le"),
    "png": Kind("png", f"mp4 mov wtv {_STORED}", pixel_format="rgb24"),
    "huffyuv": Kind("ffvhuff", _STORED),
    "raw": Kind("rawvideo", f"mkv {_STORED}"),
    "gif": Kind("gif", "mov nut gif", pixel_format="rgb8"),
    "apng": Kind("apng", "apng", pixel_format="rgb24"),
    "webp": Kind("libwebp_anim", "webp", pixel_format="bgra"),
}
