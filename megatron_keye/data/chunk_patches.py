"""Pictures of a list of chunks, decoded into patches chunk by chunk.

A video's frames are spread over many chunks; its file stays open from one chunk to the next, so
that no frame is decoded twice.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_keye.config import VisionConfig
from megatron_keye.data.frame_decoder import FrameDecoder
from megatron_keye.data.image import decode_image
from megatron_keye.data.patches import make_patches
from megatron_keye.data.row import Picture

CHANNELS = 3


@dataclass
class _Run:
    """Frames of one file that are decoded in one go, over one chunk or several in a row."""

    media: str
    is_video: bool
    last_chunk: int
    frames: list[int] = field(default_factory=list)


_Media = tuple[str, bool]


def patch_bytes(pictures: Sequence[Picture], vision: VisionConfig) -> int:
    """Return the memory that the patches of a chunk take."""
    num_patches = sum(picture.num_patches for picture in pictures)
    return num_patches * CHANNELS * vision.patch_size**2 * torch.float32.itemsize


def decode_chunks(
    chunks: Sequence[Sequence[Picture]],
    decoder: FrameDecoder,
    vision: VisionConfig,
    *,
    watch: Callable[[str], None] = lambda media: None,
) -> Generator[Tensor]:
    """Decode chunks one at a time, when the next one is asked for.

    Beside a chunk's patches, one decoded frame of each file in the chunk is held, and what the
    decoder itself works ahead.

    Args:
        chunks: Planned images and frames, in any order, repeats allowed.
        decoder: Gives the frames of videos.
        vision: Patch and merge size.
        watch: Called with the file before each frame that is waited for.

    Returns:
        For each chunk float32 [sum of num_patches, 3, patch_size, patch_size], pictures in the
        order given, on the decoder's device. Closing it early lets go of the files.

    Raises:
        ValueError: Naming the file that cannot be decoded, when its chunk is asked for.
    """
    plan = _plan(chunks)
    opened: dict[_Media, Iterator[tuple[int, Tensor]]] = {}
    for number, (chunk, runs) in enumerate(zip(chunks, plan, strict=True)):
        yield _decode_chunk(chunk, runs, opened, decoder, vision, watch)
        for media, run in runs.items():
            if run.last_chunk == number:
                # Nothing is left in it, and its end closes the file.
                assert next(opened.pop(media), None) is None, f"{run.media}: frames were left"


def _plan(chunks: Sequence[Sequence[Picture]]) -> list[dict[_Media, _Run]]:
    """Decide for each chunk from which run its frames come.

    A run goes on in the next chunk when that one needs only later frames of the file.
    """
    plan: list[dict[_Media, _Run]] = []
    for number, chunk in enumerate(chunks):
        before = plan[-1] if plan else {}
        wanted: dict[_Media, set[int]] = {}
        for picture in chunk:
            wanted.setdefault((picture.media, picture.is_video), set()).add(picture.frame)
        runs: dict[_Media, _Run] = {}
        for media, frames in wanted.items():
            run = before.get(media)
            if run is None or run.frames[-1] >= min(frames):
                run = _Run(media=media[0], is_video=media[1], last_chunk=number)
            run.last_chunk = number
            run.frames += sorted(frames)
            runs[media] = run
        plan.append(runs)
    return plan


def _decode_chunk(
    pictures: Sequence[Picture],
    runs: dict[_Media, _Run],
    opened: dict[_Media, Iterator[tuple[int, Tensor]]],
    decoder: FrameDecoder,
    vision: VisionConfig,
    watch: Callable[[str], None],
) -> Tensor:
    """Fill the patches of one chunk, taking frames from the runs that are open."""
    ends = np.cumsum([picture.num_patches for picture in pictures], dtype=np.int64).tolist()
    side = vision.patch_size
    patches = torch.empty(ends[-1] if ends else 0, CHANNELS, side, side, device=decoder.device)
    places: dict[_Media, dict[int, list[int]]] = {}
    for place, picture in enumerate(pictures):
        of_media = places.setdefault((picture.media, picture.is_video), {})
        of_media.setdefault(picture.frame, []).append(place)
    for media, of_frame in places.items():
        if media not in opened:
            opened[media] = _open(runs[media], decoder)
        for frame in sorted(of_frame):
            watch(media[0])
            index, pixels = next(opened[media])
            assert index == frame, f"{media[0]}: got frame {index}, expected {frame}"
            for place in of_frame[frame]:
                picture = pictures[place]
                made = make_patches(pixels[None], picture.grid, side)
                patches[ends[place] - picture.num_patches : ends[place]] = made
    return patches


def _open(run: _Run, decoder: FrameDecoder) -> Iterator[tuple[int, Tensor]]:
    """Start decoding the frames of a run."""
    if run.is_video:
        return decoder.frames(Path(run.media), run.frames)
    assert run.frames == [0], f"{run.media}: an image has only frame 0, got {run.frames}"
    pixels = torch.from_numpy(decode_image(Path(run.media)))
    return iter([(0, pixels.to(decoder.device))])
