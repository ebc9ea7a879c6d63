# SPDX-License-Identifier: Apache-2.0
"""Exact frames of a video by index, in presentation order, decoded on the CPU.

`dali.py` decodes the same frames on the GPU.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.data.reading import reading
from megatron_keye.data.video.packet_source import opened_packets
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.timeline import MAX_REORDERED
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError


class PyavDecoder:
    """Decodes with FFmpeg on the CPU, one frame in memory at a time."""

    device = torch.device("cpu")

    def __init__(
        self, num_threads: int = 0, probe_video: Callable[[Path], VideoInfo] = probe
    ) -> None:
        """Take the threads for one file, 0 for one a core, and what tells what a file holds."""
        self._num_threads, self._probe_video = num_threads, probe_video

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield frames as `FrameDecoder` does."""
        for index, pixels in iterate_frames(
            path, indices, num_threads=self._num_threads, probe_video=self._probe_video
        ):
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
    path: Path,
    frame_indices: Iterable[int],
    *,
    num_threads: int = 0,
    probe_video: Callable[[Path], VideoInfo] = probe,
) -> Generator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, frame) once for each distinct index, in presentation order.

    Holds one frame at a time, so that callers who shrink frames need little memory.

    Args:
        path: Video file.
        frame_indices: Indices into `probe(path).times`, in any order, repeats allowed.
        num_threads: Threads that decode; 0 for one a core.
        probe_video: Tells what the file holds; raises what `probe` raises.

    Returns:
        Pairs of index and uint8 RGB [height, width, 3], upright.

    Raises:
        UserError: As `decode_frames`, when the pair that is missing would be next.
    """
    info = probe_video(path)
    indices = check_indices(info, frame_indices)
    wanted = deque(indices)
    # Decoders drop frames of some streams until they know them better; from the top all come.
    for entry in dict.fromkeys((info.entry_before(indices), 0) if indices else ()):
        if wanted:
            yield from _decode(info, wanted, entry, num_threads)
    if wanted:
        raise UserError(
            f"{path}: {len(wanted)} of {len(indices)} wanted frames do not decode, the first is "
            f"frame {wanted[0]} at {info.times[wanted[0]]:.3f} s; the file is damaged or its "
            "container states wrong times: copy it again or remux it"
        )


def _decode(
    info: VideoInfo, wanted: deque[int], entry: int, num_threads: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode once from an entry point on; take frames that come from `wanted` and yield them."""
    index_of = {int(info.timestamps[index]): index for index in wanted}
    early: dict[int, NDArray[np.uint8]] = {}
    num_later = 0
    # One for all frames: setting it up takes as long as converting a frame does.
    converter = VideoReformatter()
    for frame in _decoded(info, entry, num_threads):
        if frame.pts is None or frame.is_corrupt:
            continue
        index = index_of.pop(frame.pts, None)
        if index is not None:
            early[index] = _upright(frame, info, converter, num_threads)
        while wanted and wanted[0] in early:
            num_later = 0
            index = wanted.popleft()
            yield index, early.pop(index)
        if not wanted:
            return
        # A frame that is out of its turn by more will not come.
        num_later += frame.pts > info.timestamps[wanted[0]]
        if num_later > MAX_REORDERED:
            return


def _decoded(info: VideoInfo, entry: int, num_threads: int) -> Iterator[av.VideoFrame]:
    """Yield all frames that FFmpeg decodes from an entry point on, in its order."""
    with opened_packets(info) as source:
        decoder = None
        for _, packet in source.read(entry):
            if decoder is None:
                decoder = source.stream.codec_context
                decoder.thread_type, decoder.thread_count = "AUTO", num_threads
            yield from decoder.decode(packet)
        if decoder is not None:
            yield from decoder.decode(None)


def _upright(
    frame: av.VideoFrame, info: VideoInfo, converter: VideoReformatter, num_threads: int
) -> NDArray[np.uint8]:
    """Convert to RGB as it is shown: uint8 [height, width, 3]."""
    sideways = info.rotation % 180 != 0
    height, width = (info.width, info.height) if sideways else (info.height, info.width)
    with reading(info.path, "a video"):
        converted = converter.reformat(
            frame, format="rgb24", height=height, width=width, threads=num_threads
        )
        pixels = np.asarray(converted.to_ndarray(), dtype=np.uint8)
    if info.is_mirrored:
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, info.rotation // 90)
