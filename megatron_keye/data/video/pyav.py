"""Exact frames of a video by index, in presentation order, decoded on the CPU.

`dali.py` decodes the same frames on the GPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.data.video.probe import VideoInfo, opened_video, probe
from megatron_keye.errors import UserError


class PyavDecoder:
    """Decodes with FFmpeg on the CPU, one frame in memory at a time."""

    device = torch.device("cpu")

    def __init__(self, num_threads: int = 0) -> None:
        """Take the threads for one file; 0 for one a core."""
        self._num_threads = num_threads

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield frames as `FrameDecoder` does."""
        for index, pixels in iterate_frames(path, indices, num_threads=self._num_threads):
            yield index, torch.from_numpy(np.ascontiguousarray(pixels))

    def close(self) -> None:
        """Nothing outlives an iterator."""


def decode_frames(path: Path, frame_indices: Sequence[int]) -> NDArray[np.uint8]:
    """Return frames of a video by their index in presentation order.

    Args:
        path: Video file.
        frame_indices: Indices into `probe(path).times`, in any order, repeats allowed.

    Returns:
        uint8 RGB [len(frame_indices), height, width, 3], upright, in the order asked for.

    Raises:
        UserError: Naming the file: unreadable, an index that is negative or past its end, or
            wanted frames that do not decode.
    """
    info = probe(path)
    frames = np.empty((len(frame_indices), info.height, info.width, 3), dtype=np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(frame_indices):
        places.setdefault(int(index), []).append(place)
    for index, frame in iterate_frames(path, places):
        frames[places[index]] = frame
    return frames


def check_indices(info: VideoInfo, frame_indices: Iterable[int]) -> list[int]:
    """Return the distinct indices in ascending order.

    Raises:
        UserError: Naming the file, for an index that is negative or past its end.
    """
    wanted = sorted({int(index) for index in frame_indices})
    for index in wanted[:1] + wanted[-1:]:
        if not 0 <= index < info.num_frames:
            raise UserError(
                f"{info.path}: frame {index} was asked for, expected 0 to {info.num_frames - 1}; "
                "plan the frames from probe() of this very file"
            )
    return wanted


def iterate_frames(
    path: Path, frame_indices: Iterable[int], *, num_threads: int = 0
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, frame) once for each distinct index, in presentation order.

    A file whose keyframes give broken frames is decoded a second time from the top; the frames
    of that pass come after those of the first. Holds one frame at a time, so that callers who
    shrink frames need little memory.

    Args:
        path: Video file.
        frame_indices: Indices into `probe(path).times`, in any order, repeats allowed.
        num_threads: Threads that decode; 0 for one a core.

    Returns:
        Pairs of index and uint8 RGB [height, width, 3], upright.

    Raises:
        UserError: As `decode_frames`, when the pair that is missing would be next.
    """
    info = probe(path)
    wanted = check_indices(info, frame_indices)
    missing = set(wanted)
    # Some streams flag keyframes where decoding can't start; from the top all frames come.
    for start in dict.fromkeys((_keyframe_before(info, wanted), 0)):
        for pair in _decode(info, sorted(missing), start, num_threads):
            missing.discard(pair[0])
            yield pair
    if missing:
        first = min(missing)
        raise UserError(
            f"{path}: {len(missing)} of {len(wanted)} wanted frames do not decode, the first is "
            f"frame {first} at {info.times[first]:.3f} s; the file is damaged or its container "
            "states wrong times: copy it again or remux it"
        )


def _keyframe_before(info: VideoInfo, wanted: list[int]) -> int:
    """Return the last keyframe at or before the first wanted frame, 0 when there is none."""
    place = int(np.searchsorted(info.keyframes, wanted[:1], side="right").sum())
    return int(info.keyframes[place - 1]) if place else 0


def _decode(
    info: VideoInfo, wanted: list[int], start: int, num_threads: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode once from frame `start` on and yield the wanted frames that are not corrupt."""
    if not wanted:
        return
    index_of = {int(info.timestamps[index]): index for index in wanted}
    last = int(info.timestamps[wanted[-1]])
    with opened_video(info.path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        if start:
            container.seek(int(info.timestamps[start]), stream=stream, backward=True)
        # One for all frames: setting it up takes as long as converting a frame does.
        converter = VideoReformatter()
        for frame in container.decode(stream):
            if frame.pts is None or frame.is_corrupt:
                continue
            index = index_of.pop(frame.pts, None)
            if index is not None:
                yield index, _upright(frame, info, converter, num_threads)
            if frame.pts >= last:
                return


def _upright(
    frame: av.VideoFrame, info: VideoInfo, converter: VideoReformatter, num_threads: int
) -> NDArray[np.uint8]:
    """Convert to RGB as it is shown: uint8 [height, width, 3]."""
    sideways = info.rotation % 180 != 0
    height, width = (info.width, info.height) if sideways else (info.height, info.width)
    converted = converter.reformat(
        frame, format="rgb24", height=height, width=width, threads=num_threads
    )
    pixels = np.asarray(converted.to_ndarray(), dtype=np.uint8)
    if info.is_mirrored:
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, info.rotation // 90)
