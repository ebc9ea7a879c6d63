"""Decodes video on the GPU with DALI, piece by piece, several pieces side by side.

DALI is given small containers of our own cutting and indices that were checked before: left to
itself it reads whole files, returns black frames past the end, and miscounts frames in the cases
that `gpu_rules.py` sends to the CPU instead. Damage inside a compressed frame, which FFmpeg
reports, the hardware hides; `probe` finds what the container shows of it.
"""

import logging
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from megatron_keye.data.color import to_space_of
from megatron_keye.data.frame_decoder import PyavDecoder
from megatron_keye.data.segment import Segment, cut_segments
from megatron_keye.data.video import VideoInfo, check_indices, probe

DEFAULT_STREAMS = 4
"""Pieces decoded side by side; each takes a decoder of the GPU, of which an H100 has seven."""
PIECE_BYTES = 256 * 2**20
"""Decoded pixels of one piece at most; its frames are converted together."""

_logger = logging.getLogger(__name__)


class DaliDecoder:
    """Decodes H.264, HEVC and VP9 on one GPU, and the rest on the CPU, each file wholly on one.

    Args:
        device: The GPU.
        num_streams: Pieces decoded side by side.
    """

    def __init__(self, device: torch.device, num_streams: int = DEFAULT_STREAMS) -> None:
        self._device = torch.device("cuda", device.index or 0)
        self._num_streams = num_streams
        self._pool = ThreadPoolExecutor(num_streams, thread_name_prefix="dali")
        self._idle: queue.SimpleQueue[_PieceDecoder] = queue.SimpleQueue()
        self._on_cpu = PyavDecoder()
        self._told: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield frames as `FrameDecoder` says; decoding runs ahead by a piece a stream.

        Raises:
            ValueError: As `FrameDecoder`; also with what DALI said of the file.
        """
        info = probe(path)
        wanted = check_indices(info, indices)
        if info.gpu_obstacle:
            self._tell(info)
            for index, frame in self._on_cpu.frames(path, wanted):
                yield index, frame.to(self._device)
            return
        started: deque[tuple[Segment, Future[Tensor]]] = deque()
        try:
            for segment in cut_segments(info, wanted, _frames_of_piece(info)):
                started.append((segment, self._pool.submit(self._decode, info, segment)))
                if len(started) == self._num_streams:
                    yield from self._finish(info, *started.popleft())
            while started:
                yield from self._finish(info, *started.popleft())
        finally:
            for _, future in started:
                future.cancel()

    def close(self) -> None:
        """End the threads after what they are at."""
        self._pool.shutdown(cancel_futures=True)

    def _tell(self, info: VideoInfo) -> None:
        """Log each reason for the CPU once."""
        if info.gpu_obstacle not in self._told:
            self._told.add(info.gpu_obstacle)
            _logger.warning("%s: decoded on the CPU, since %s", info.path, info.gpu_obstacle)

    def _decode(self, info: VideoInfo, segment: Segment) -> Tensor:
        """Decode one piece: uint8 [frames, height, width, 3] as stored, ready for any stream."""
        try:
            decoder = self._idle.get_nowait()
        except queue.Empty:
            decoder = _PieceDecoder(self._device)
        try:
            frames = decoder(segment)
        except RuntimeError as error:
            # The pipeline that failed is not used again.
            raise ValueError(
                f"{info.path}: DALI could not decode frames {segment.indices[0]} to "
                f"{segment.indices[-1]} ({' '.join(str(error).split())}), expected an undamaged "
                "video; copy it again, or decode with data.decode.backend=pyav"
            ) from error
        self._idle.put(decoder)
        return frames

    def _finish(
        self, info: VideoInfo, segment: Segment, future: Future[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Turn a piece's frames upright, on the stream of whoever takes them."""
        frames = future.result()
        # Their memory belongs to the stream that filled it; it must outlast what reads it here.
        frames.record_stream(torch.cuda.current_stream(self._device))
        height, width = info.height, info.width
        stored = (width, height) if info.rotation % 180 else (height, width)
        if tuple(frames.shape[1:3]) != stored:
            raise ValueError(
                f"{info.path}: DALI gave frames of {tuple(frames.shape[1:3])}, expected {stored}; "
                "decode it with data.decode.backend=pyav"
            )
        for index, frame in zip(segment.indices, frames, strict=True):
            pixels = to_space_of(frame, info.color_space)
            if info.is_mirrored:
                pixels = pixels.flip(1)
            yield index, torch.rot90(pixels, info.rotation // 90)


class _PieceDecoder:
    """A pipeline that takes one container at a time; one thread uses it at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pipeline = Pipeline(
            batch_size=1, num_threads=1, device_id=device.index, prefetch_queue_depth=1
        )
        with self._pipeline:
            container = fn.external_source(name="container", dtype=types.UINT8, ndim=1)
            places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
            # With "none" an index past the end fails instead of giving a black frame.
            frames = fn.decoders.video(container, device="mixed", frames=places, pad_mode="none")
            self._pipeline.set_outputs(frames)
        self._pipeline.build()

    def __call__(self, segment: Segment) -> Tensor:
        """Return the wanted frames of a piece, complete."""
        self._pipeline.feed_input("container", [np.frombuffer(segment.container, dtype=np.uint8)])
        self._pipeline.feed_input("places", [np.array(segment.places, dtype=np.int32)])
        (decoded,) = self._pipeline.run()
        batch = decoded[0]
        with torch.cuda.stream(self._stream):
            frames = torch.empty(batch.shape(), dtype=torch.uint8, device=self._stream.device)
            feed_ndarray(batch, frames, cuda_stream=self._stream)
        self._stream.synchronize()
        return frames


def _frames_of_piece(info: VideoInfo) -> int:
    return max(1, PIECE_BYTES // (3 * info.height * info.width))
