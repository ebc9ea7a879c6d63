"""Decodes video on the GPU with DALI, piece by piece, several pieces side by side.

DALI is given small containers of our own cutting and indices that were checked before: left to
itself it reads whole files, returns black frames past the end, and miscounts frames in the cases
that `gpu_rules.py` sends to the CPU instead. Damage inside a compressed frame, which FFmpeg
reports, the hardware hides; `probe` finds what the container shows of it.
"""

import logging
import math
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

from megatron_keye.data.video.color import BT709, to_space_of
from megatron_keye.data.video.frame_runs import Piece, plan_pieces
from megatron_keye.data.video.probe import VideoInfo, probe
from megatron_keye.data.video.pyav import PyavDecoder, check_indices
from megatron_keye.data.video.segment import Segment, SegmentCutter, opened_cutter
from megatron_keye.errors import UserError

DEFAULT_STREAMS = 8
"""Pieces decoded side by side; each takes a decoder of the GPU, of which an H100 has seven."""
PIECE_BYTES = 512 * 2**20
"""Wanted pixels of one piece at most, which DALI gives all at once; they are held twice meanwhile.
At 2 of 24 frames a second a piece holds a tenth of it."""
PIECE_FRAMES = range(60, 241)
"""Frames decoded for one piece. DALI's beginning, which allocates memory for each piece, takes
6 to 11 ms at 720p; longer pieces would leave decoders idle at a video's end."""
_CONVERTED_BYTES = 32 * 2**20
"""Pixels whose colours are converted at once, through floats."""

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
            UserError: As `FrameDecoder`; also with what DALI said of the file.
        """
        info = probe(path)
        wanted = check_indices(info, indices)
        if info.gpu_unsupported_reason:
            self._tell(info)
            for index, frame in self._on_cpu.frames(path, wanted):
                yield index, frame.to(self._device)
            return
        started: deque[Future[tuple[Piece, Tensor]]] = deque()
        with opened_cutter(info) as cutter:
            try:
                for piece in self._pieces(info, wanted):
                    started.append(self._pool.submit(self._decode, info, cutter, piece))
                    # One is being taken and one waits its turn, so that no stream is idle.
                    if len(started) > self._num_streams + 1:
                        yield from self._finish(started.popleft())
                while started:
                    yield from self._finish(started.popleft())
            finally:
                for future in started:
                    future.cancel()

    def close(self) -> None:
        """End the threads after what they are at."""
        self._pool.shutdown(cancel_futures=True)

    def _tell(self, info: VideoInfo) -> None:
        """Log each reason for the CPU once."""
        if info.gpu_unsupported_reason not in self._told:
            self._told.add(info.gpu_unsupported_reason)
            _logger.warning(
                "%s: decoded on the CPU, since %s", info.path, info.gpu_unsupported_reason
            )

    def _pieces(self, info: VideoInfo, wanted: list[int]) -> list[Piece]:
        """Divide the wanted frames so that all streams have work and beginnings are few."""
        if not wanted:
            return []
        span = wanted[-1] - wanted[0] + 1
        max_wanted = max(1, PIECE_BYTES // (3 * info.height * info.width))
        longest = min(PIECE_FRAMES.stop - 1, max_wanted * span // len(wanted))
        # As many pieces as streams, or a multiple of that, so that all streams end together.
        num_rounds = math.ceil(span / (self._num_streams * longest))
        share = math.ceil(span / (self._num_streams * num_rounds))
        return plan_pieces(
            info.random_access_points,
            info.num_frames,
            wanted,
            max_wanted=max_wanted,
            max_decoded=max(share, PIECE_FRAMES.start),
        )

    def _decode(
        self, info: VideoInfo, cutter: SegmentCutter, piece: Piece
    ) -> tuple[Piece, Tensor]:
        """Decode one piece: uint8 [frames, height, width, 3], upright, ready for any stream."""
        segment = cutter.cut(piece)
        try:
            decoder = self._idle.get_nowait()
        except queue.Empty:
            decoder = _PieceDecoder(self._device)
        try:
            with torch.cuda.stream(decoder.stream):
                frames = _as_shown(decoder(segment), segment, info)
            decoder.stream.synchronize()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The pipeline that failed is not used again.
            raise UserError(
                f"{info.path}: DALI could not decode frames {piece.indices[0]} to "
                f"{piece.indices[-1]} ({' '.join(str(error).split())}), expected an undamaged "
                "video; copy it again, or decode with data.decode.backend=pyav"
            ) from error
        self._idle.put(decoder)
        return piece, frames

    def _finish(self, future: Future[tuple[Piece, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Hand a piece's frames to the stream of whoever takes them."""
        piece, frames = future.result()
        # Their memory belongs to the stream that filled it; it must outlast what reads it here.
        frames.record_stream(torch.cuda.current_stream(self._device))
        yield from zip(piece.indices, frames.unbind(), strict=True)


def _as_shown(frames: Tensor, segment: Segment, info: VideoInfo) -> Tensor:
    """Crop decoded frames, put their colours right and turn them upright."""
    if tuple(frames.shape[1:3]) != (segment.height, segment.width):
        raise UserError(
            f"{info.path}: DALI gave frames of {tuple(frames.shape[1:3])}, expected "
            f"{(segment.height, segment.width)}; decode it with data.decode.backend=pyav"
        )
    height, width = info.height, info.width
    if info.rotation % 180:
        height, width = width, height
    frames = frames[:, :height, :width]
    if info.color_space == BT709:
        for part in frames.split(max(1, _CONVERTED_BYTES // frames[0].numel())):
            part.copy_(to_space_of(part, info.color_space))
    if info.is_mirrored:
        frames = frames.flip(2)
    quarters = info.rotation // 90
    return torch.rot90(frames, quarters, (1, 2)) if quarters else frames


class _PieceDecoder:
    """A pipeline that takes one container at a time; one thread uses it at a time."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
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
        """Return a piece's wanted frames as stored, complete on the current stream."""
        self._pipeline.feed_input("container", [np.frombuffer(segment.container, dtype=np.uint8)])
        self._pipeline.feed_input("places", [np.array(segment.places, dtype=np.int32)])
        (decoded,) = self._pipeline.run()
        batch = decoded[0]
        frames = torch.empty(batch.shape(), dtype=torch.uint8, device=self.stream.device)
        feed_ndarray(batch, frames, cuda_stream=torch.cuda.current_stream(self.stream.device))
        return frames
