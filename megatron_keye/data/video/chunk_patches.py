# SPDX-License-Identifier: Apache-2.0
"""Pictures of a list of chunks, decoded into patches chunk by chunk.

A video's frames are spread over many chunks; its file stays open from one chunk to the next, so
that no frame is decoded twice.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_keye.config import RemoteConfig, VisionConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.remote.copies import NO_REMOTE, local_copy
from megatron_keye.data.row import Picture
from megatron_keye.data.video.frame_decoder import FrameDecoder
from megatron_keye.data.video.image import decode_image
from megatron_keye.data.video.patches import make_patches
from megatron_keye.errors import UserError

CHANNELS = 3


@dataclass
class _Run:
    """Frames of one file that are decoded in one pass, over one chunk or several in a row."""

    medium: Medium
    last_chunk: int
    frames: list[int] = field(default_factory=list)


def patch_bytes(pictures: Sequence[Picture], vision: VisionConfig) -> int:
    """Return the memory that the patches of a chunk take."""
    num_patches = sum(picture.num_patches for picture in pictures)
    return num_patches * CHANNELS * vision.patch_size**2 * torch.float32.itemsize


def decode_chunks(
    chunks: Sequence[Sequence[Picture]],
    decoder: FrameDecoder,
    vision: VisionConfig,
    *,
    remote: RemoteConfig = NO_REMOTE,
    watch: Callable[[str], None] = lambda media: None,
    on_failure: Callable[[str, UserError], None] | None = None,
) -> Generator[Tensor]:
    """Decode chunks one at a time, when the next one is asked for.

    Beside a chunk's patches, one decoded frame of each file in the chunk is held, and what the
    decoder itself works ahead.

    Args:
        chunks: Planned images and frames, in any order, repeats allowed.
        decoder: Gives the frames of videos.
        vision: Patch and merge size.
        remote: Where copies of remote files are kept; by default such files are refused.
        watch: Called with the file before each frame that is waited for, and when bytes of it have
            been downloaded.
        on_failure: Called once with each file that cannot be decoded, whose pictures are then
            grey from that chunk on. None: such a file ends decoding.

    Returns:
        For each chunk float32 [sum of num_patches, 3, patch_size, patch_size], pictures in the
        order given, on the decoder's device. Closing it early lets go of the files.

    Raises:
        UserError: Naming the file that cannot be decoded, when its chunk is asked for, unless
            `on_failure` is given.
    """
    files = _Files(decoder, vision, remote, watch, on_failure)
    for number, (chunk, runs) in enumerate(zip(chunks, _plan(chunks), strict=True)):
        yield files.decode_chunk(chunk, runs)
        files.close([medium for medium, run in runs.items() if run.last_chunk == number])


def _plan(chunks: Sequence[Sequence[Picture]]) -> list[dict[Medium, _Run]]:
    """Decide for each chunk from which run its frames come.

    A run goes on in the next chunk when that one needs only later frames of the file.
    """
    plan: list[dict[Medium, _Run]] = []
    for number, chunk in enumerate(chunks):
        before = plan[-1] if plan else {}
        wanted: dict[Medium, set[int]] = {}
        for picture in chunk:
            wanted.setdefault(picture.medium, set()).add(picture.frame)
        runs: dict[Medium, _Run] = {}
        for medium, frames in wanted.items():
            run = before.get(medium)
            if run is None or run.frames[-1] >= min(frames):
                run = _Run(medium=medium, last_chunk=number)
            run.last_chunk = number
            run.frames += sorted(frames)
            runs[medium] = run
        plan.append(runs)
    return plan


@dataclass
class _Files:
    """Decodes chunk after chunk; files stay open in between."""

    decoder: FrameDecoder
    vision: VisionConfig
    remote: RemoteConfig
    watch: Callable[[str], None]
    on_failure: Callable[[str, UserError], None] | None
    opened: dict[Medium, Iterator[tuple[int, Tensor]]] = field(default_factory=dict)
    failed: set[Medium] = field(default_factory=set)

    def decode_chunk(self, pictures: Sequence[Picture], runs: dict[Medium, _Run]) -> Tensor:
        """Make the patches of one chunk, taking frames from the runs that are open."""
        ends = np.cumsum([picture.num_patches for picture in pictures], dtype=np.int64).tolist()
        side, device = self.vision.patch_size, self.decoder.device
        patches = torch.empty(ends[-1] if ends else 0, CHANNELS, side, side, device=device)
        places: dict[Medium, dict[int, list[int]]] = {}
        for place, picture in enumerate(pictures):
            of_media = places.setdefault(picture.medium, {})
            of_media.setdefault(picture.frame, []).append(place)
        parts = [
            patches[end - picture.num_patches : end]
            for end, picture in zip(ends, pictures, strict=True)
        ]
        for medium, of_frame in places.items():
            if medium not in self.failed:
                self._decode(runs[medium], of_frame, pictures, parts)
            if medium in self.failed:
                for place in (place for same in of_frame.values() for place in same):
                    parts[place].zero_()
        return patches

    def close(self, finished: Sequence[Medium]) -> None:
        """Let go of files whose runs have ended; the end of an iterator closes its file."""
        for medium in finished:
            if medium not in self.failed:
                assert next(self.opened.pop(medium), None) is None, (
                    f"{medium.path}: frames were left"
                )

    def _decode(
        self,
        run: _Run,
        of_frame: dict[int, list[int]],
        pictures: Sequence[Picture],
        parts: Sequence[Tensor],
    ) -> None:
        """Fill the parts that show frames of one file."""
        medium = run.medium
        try:
            if medium not in self.opened:
                self.opened[medium] = self._open(run)
            for frame in sorted(of_frame):
                self.watch(medium.path)
                index, pixels = next(self.opened[medium])
                assert index == frame, f"{medium.path}: got frame {index}, expected {frame}"
                for place in of_frame[frame]:
                    patch_grid, patch_size = pictures[place].patch_grid, self.vision.patch_size
                    parts[place].copy_(make_patches(pixels[None], patch_grid, patch_size))
        except UserError as error:
            if self.on_failure is None:
                raise
            self.opened.pop(medium, None)
            self.failed.add(medium)
            self.on_failure(medium.path, error)

    def _open(self, run: _Run) -> Iterator[tuple[int, Tensor]]:
        """Decode the frames of a run; a remote file is held from the first to the last."""
        medium = run.medium
        on_bytes = partial(self.watch, medium.path)
        with local_copy(medium, self.remote, on_bytes=on_bytes) as path:
            if medium.kind == "video":
                yield from self.decoder.frames(path, run.frames)
            else:
                assert run.frames == [0], f"{path}: an image has only frame 0, got {run.frames}"
                yield 0, torch.from_numpy(decode_image(path)).to(self.decoder.device)
