# SPDX-License-Identifier: Apache-2.0
"""Chunks: pictures in their order, each file opened once for all chunks that follow each other."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_keye.data.media import Medium, MediumKind
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks, patch_bytes
from megatron_keye.data.video.pyav import PyavDecoder
from megatron_keye.errors import UserError
from tests.support.clips import make_clip, read_number, tiny_vision

VISION = tiny_vision(patch_size=8)
PATCH_GRID = (6, 16)


class CountingDecoder(PyavDecoder):
    """Notes what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[int]]] = []

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        self.asked.append((path.name, list(indices)))
        return super().frames(path, indices)


class FailingDecoder(CountingDecoder):
    """Fails in one file, at one frame."""

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for index, frame in super().frames(path, indices):
            if path.name == "bad.mp4" and index == 5:
                raise UserError(f"{path}: is damaged")
            yield index, frame


def picture(path: Path, frame: int) -> Picture:
    kind: MediumKind = "image" if path.suffix == ".png" else "video"
    return Picture(medium=Medium(str(path), kind), frame=frame, patch_grid=PATCH_GRID)


def pixels_of(patches: Tensor) -> Tensor:
    frames = patches.reshape(-1, *PATCH_GRID, 3, 8, 8).permute(0, 1, 4, 2, 5, 3)
    return (frames.reshape(-1, 48, 128, 3) + 1) * 127.5


def numbers_of(patches: Tensor) -> list[int]:
    return [read_number(frame.numpy().astype(np.uint8)) for frame in pixels_of(patches)]


def test_pictures_keep_their_order_and_repeats(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{name}.mp4", 30) for name in "ab"]
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(image)
    wanted = [(clips[0], 20), (clips[1], 3), (image, 0), (clips[0], 5), (clips[0], 20)]
    chunk = [picture(path, frame) for path, frame in wanted]
    (patches,) = decode_chunks([chunk], PyavDecoder(), VISION)
    assert patches.nbytes == patch_bytes(chunk, VISION)
    numbers = numbers_of(patches)
    assert [numbers[place] for place in (0, 1, 3, 4)] == [20, 3, 5, 20]
    assert torch.equal(pixels_of(patches)[2].mean((0, 1)).round(), torch.tensor([255.0, 0, 0]))


def test_no_pictures_give_no_patches() -> None:
    (patches,) = decode_chunks([[]], PyavDecoder(), tiny_vision())
    assert patches.shape == (0, 3, 14, 14)


def test_a_file_is_opened_once_for_chunks_that_follow_each_other(tmp_path: Path) -> None:
    clip, other = (make_clip(tmp_path / f"{name}.mp4", 30) for name in "ab")
    frames = [[0, 5], [6, 6, 12], [12, 20], [3, 21], []]
    chunks = [[picture(clip, frame) for frame in chunk] for chunk in frames]
    chunks[1].append(picture(other, 1))
    chunks[4].append(picture(clip, 29))
    decoder = CountingDecoder()
    decoded = [numbers_of(patches) for patches in decode_chunks(chunks, decoder, VISION)]
    assert decoded == [[0, 5], [6, 6, 12, 1], [12, 20], [3, 21], [29]]
    # A frame that is needed again, or an earlier one, starts the file anew.
    assert decoder.asked == [
        ("a.mp4", [0, 5, 6, 12]),
        ("b.mp4", [1]),
        ("a.mp4", [12, 20]),
        ("a.mp4", [3, 21, 29]),
    ]


def test_pictures_of_a_file_that_fails_are_grey_from_its_chunk_on(tmp_path: Path) -> None:
    good, bad = (make_clip(tmp_path / f"{name}.mp4", 12) for name in ("good", "bad"))
    chunks = [
        [picture(bad, 0), picture(good, 1)],
        [picture(bad, 4), picture(good, 3), picture(bad, 5)],
        [picture(good, 6)],
        [picture(bad, 1), picture(good, 0)],
    ]
    failures: list[tuple[str, str]] = []
    decoder = FailingDecoder()
    decoded = list(
        decode_chunks(
            chunks,
            decoder,
            VISION,
            on_failure=lambda media, error: failures.append((media, str(error))),
        )
    )
    assert failures == [(str(bad), f"{bad}: is damaged")]
    assert [name for name, _ in decoder.asked].count("bad.mp4") == 1, "it was opened again"
    for number, (chunk, whole, mine) in enumerate(
        zip(chunks, decode_chunks(chunks, PyavDecoder(), VISION), decoded, strict=True)
    ):
        for planned, expected, got in zip(chunk, whole.split(96), mine.split(96), strict=True):
            is_grey = planned.medium.path == str(bad) and number > 0
            assert torch.equal(got, torch.zeros_like(got) if is_grey else expected)


def test_a_file_that_fails_ends_decoding_unless_it_may(tmp_path: Path) -> None:
    bad = make_clip(tmp_path / "bad.mp4", 12)
    with pytest.raises(ValueError, match=r"bad\.mp4: is damaged"):
        list(decode_chunks([[picture(bad, 5)]], FailingDecoder(), VISION))
