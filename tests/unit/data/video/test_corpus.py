# SPDX-License-Identifier: Apache-2.0
"""What preparation accepts, training decodes: every container and codec, from any start.

A frame by index is the frame that decoding the whole file plainly gives, bit for bit, whether one
rank encodes the file or two, and wherever its frames are divided into chunks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_keye.data.media import Medium
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.container import opened_video
from megatron_keye.data.video.patches import make_patches
from megatron_keye.data.video.probe_cache import ProbeCache
from megatron_keye.data.video.pyav import PyavDecoder
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError
from tests.support.clips import read_number, tiny_vision
from tests.support.corpus import CONTAINERS, KINDS, Kind

NUM_FRAMES = 44
NUM_STARTS = 6
VISION = tiny_vision(patch_size=8)
PATCH_GRID = (6, 16)
"""Frames of 48 x 128 keep every pixel."""
REMEDIES = ("re-encode", "copy it again", "drop the sample", "remux", "join the recordings")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = av.logging.get_level()
    av.logging.set_level(None)
    yield
    av.logging.set_level(level)


def prepared(path: Path) -> VideoInfo | str:
    """Return what preparation finds, or the sentence with which it refuses a file."""
    try:
        return ProbeCache(path.parent / "probes").probe(path)
    except UserError as error:
        return str(error)


def plainly_decoded(path: Path) -> list[NDArray[np.uint8]]:
    """Return all frames of a file as FFmpeg gives them, from the top."""
    with opened_video(path) as (container, stream):
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def windows(num_frames: int, num_starts: int) -> list[list[int]]:
    """Return the frames that windows show: all, some neighbours, some far apart."""
    starts = np.linspace(0, num_frames - 1, num_starts).astype(int).tolist()
    return [[f for f in (s, s + 1, s + 2, s + 7, s + 20) if f < num_frames] for s in starts]


def decoded(info: VideoInfo, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Decode frames as a rank of training does, from what preparation kept."""
    kept = info.to_bytes()
    decoder = PyavDecoder(1, lambda path: VideoInfo.from_bytes(path, kept))
    medium = Medium(str(info.path), "video")
    pictures = [
        [Picture(medium=medium, frame=frame, patch_grid=PATCH_GRID) for frame in chunk]
        for chunk in chunks
    ]
    return torch.cat(list(decode_chunks(pictures, decoder, VISION)))


def assert_every_way_gives_the_same(info: VideoInfo, num_starts: int) -> None:
    frames = plainly_decoded(info.path)
    assert info.num_frames == len(frames), f"{info.path}: frames were miscounted"
    # AV1's encoder blurs some numbers away.
    is_right = [read_number(frame) == number for number, frame in enumerate(frames)]
    assert np.mean(is_right) > 0.9, f"{info.path}: FFmpeg itself gives another order"
    pixels = torch.from_numpy(np.stack(frames))
    patches = make_patches(pixels, PATCH_GRID, VISION.patch_size).reshape(
        len(frames), -1, 3, VISION.patch_size, VISION.patch_size
    )
    for window in windows(info.num_frames, num_starts):
        half = (len(window) + 1) // 2
        one_rank = decoded(info, [window[:half], window[half:]])
        two_ranks = torch.cat([decoded(info, [window[:1]]), decoded(info, [window[1:]])])
        expected = patches[window].flatten(0, 1)
        for got in (one_rank, two_ranks):
            assert torch.equal(got, expected), f"{info.path}: other pixels in {window}"


def check(kind: Kind, folder: Path, num_frames: int, num_starts: int) -> None:
    """Write a codec into all containers, and train on what is accepted."""
    accepted = set()
    for suffix in CONTAINERS:
        path = folder / f"clip.{suffix}"
        if not kind.write(path, num_frames):
            continue
        info = prepared(path)
        if isinstance(info, VideoInfo):
            accepted.add(suffix)
            assert_every_way_gives_the_same(info, num_starts)
        else:
            assert info.startswith(f"{path}: "), "the file is not named"
            assert any(remedy in info for remedy in REMEDIES), f"no remedy: {info}"
    assert accepted == set(kind.accepted.split())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_preparation_accepts_training_decodes(tmp_path: Path, kind: Kind) -> None:
    check(kind, tmp_path, NUM_FRAMES, NUM_STARTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_start_of_a_longer_clip(tmp_path: Path, kind: Kind) -> None:
    check(kind, tmp_path, 130, 65)
