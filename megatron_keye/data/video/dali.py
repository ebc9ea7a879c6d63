# SPDX-License-Identifier: Apache-2.0
"""Decodes video on the GPU with DALI, in rounds of segments that are decoded side by side.

DALI is given segments and indices that were checked before: on its own it reads whole files,
returns black frames past the end, and miscounts frames in the cases that `gpu_rules.py` sends to
the CPU instead. Damage inside a compressed frame, which FFmpeg reports, the hardware hides;
`probe` finds what the container shows of it.

One pipeline runs at a time in a process. DALI 2.4 keeps frames that are decoded ahead in memory
that it frees as soon as a segment's last copy is in its stream, not when it has ended. In one
pipeline all that takes this memory next waits in the same stream; another one's stream could write
its own frames there first, and on a busy GPU did.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import batched, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from megatron_keye.data.video.color import BT709, to_space_of
from megatron_keye.data.video.frame_runs import FrameRuns, plan_frame_runs
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import PyavDecoder, check_indices
from megatron_keye.data.video.segment import Segment, opened_cutter
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

DEFAULT_STREAMS = 8
"""Segments decoded side by side; each takes a decoder of the GPU, of which an H100 has seven."""
SEGMENT_BYTES = 512 * 2**20
"""Most bytes of wanted pixels in one segment, which DALI returns all at once; they are held twice
for a while. At 2 of 24 frames a second a segment holds a tenth of it."""
SEGMENT_FRAMES = range(60, 241)
"""Frames decoded for one segment. Starting one, for which DALI allocates memory, takes 6 to 11 ms
at 720p; longer segments would leave decoders idle at a video's end."""
_CONVERTED_BYTES = 32 * 2**20
"""Pixels whose colours are converted at once, through floats."""

_RUNNING = threading.Lock()
"""Held while a pipeline runs, until its stream has nothing left to do."""

_logger = logging.getLogger(__name__)


class DaliDecoder:
    """Decodes H.264, HEVC and VP9 on one GPU, and the rest on the CPU, each file wholly on one.

    Args:
        device: The GPU.
        num_streams: Segments decoded side by side.
        probe_video: Tells what a file holds; raises what `probe` raises.
    """

    def __init__(
        self,
        device: torch.device,
        num_streams: int = DEFAULT_STREAMS,
        probe_video: Callable[[Path], VideoInfo] = probe,
    ) -> None:
        self._device = torch.device("cuda", device.index or 0)
        self._num_streams = num_streams
        self._cutting = ThreadPoolExecutor(1, thread_name_prefix="dali-cut")
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="dali")
        self._pipeline: _RoundDecoder | None = None
        self._probe_video = probe_video
        self._on_cpu = PyavDecoder(probe_video=probe_video)
        self._logged_reasons: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield frames as `FrameDecoder` does; decoding runs ahead by a round of segments.

        Raises:
            UserError: As `FrameDecoder`; also with DALI's own error.
        """
        info = self._probe_video(path)
        wanted = check_indices(info, indices)
        if info.gpu_unsupported_reason:
            self._log_reason(info)
            for index, frame in self._on_cpu.frames(path, wanted):
                yield index, frame.to(self._device)
            return
        rounds = list(batched(self._plan(info, wanted), self._num_streams))
        waiting = iter(rounds)
        cut: deque[list[Future[Segment]]] = deque()
        decoded: deque[Future[list[Tensor]]] = deque()
        with opened_cutter(info) as cutter:
            try:
                for taken in rounds:
                    # While this round is taken, the next one is decoded and one more is cut.
                    for runs in islice(waiting, 3 - len(cut) - len(decoded)):
                        cut.append([self._cutting.submit(cutter.cut, each) for each in runs])
                    while cut and len(decoded) < 2:
                        decoded.append(self._decoding.submit(self._decode, info, cut.popleft()))
                    yield from self._finish(taken, decoded.popleft())
            finally:
                unfinished: list[Future[Any]] = [*decoded, *chain.from_iterable(cut)]
                for future in unfinished:
                    future.cancel()

    def close(self) -> None:
        """End the threads once they have finished what they are at."""
        self._cutting.shutdown(cancel_futures=True)
        self._decoding.shutdown(cancel_futures=True)

    def _log_reason(self, info: VideoInfo) -> None:
        """Log each reason for the CPU once."""
        if info.gpu_unsupported_reason not in self._logged_reasons:
            self._logged_reasons.add(info.gpu_unsupported_reason)
            _logger.warning(
                "%s: decoded on the CPU, since %s", info.path, info.gpu_unsupported_reason
            )

    def _plan(self, info: VideoInfo, wanted: list[int]) -> list[FrameRuns]:
        """Divide the wanted frames so that all streams have work and segments are few."""
        if not wanted:
            return []
        span = wanted[-1] - wanted[0] + 1
        max_wanted = max(1, SEGMENT_BYTES // (3 * info.height * info.width))
        longest = min(SEGMENT_FRAMES.stop - 1, max_wanted * span // len(wanted))
        # As many segments as streams, or a multiple of that, so that all streams end together.
        num_rounds = math.ceil(span / (self._num_streams * longest))
        share = math.ceil(span / (self._num_streams * num_rounds))
        return plan_frame_runs(
            info.random_access_points,
            info.num_frames,
            wanted,
            max_wanted=max_wanted,
            max_decoded=max(share, SEGMENT_FRAMES.start),
        )

    def _decode(self, info: VideoInfo, cut: Sequence[Future[Segment]]) -> list[Tensor]:
        """Decode a round: of each segment uint8 [frames, height, width, 3], upright."""
        segments = [future.result() for future in cut]
        pipeline = self._pipeline or _RoundDecoder(self._device, self._num_streams)
        self._pipeline = None
        try:
            with torch.cuda.stream(pipeline.stream):
                with _RUNNING:
                    decoded = pipeline(segments)
                frames = [
                    _as_shown(each, segment, info)
                    for each, segment in zip(decoded, segments, strict=True)
                ]
            pipeline.stream.synchronize()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The pipeline that failed is not used again.
            raise UserError(
                f"{info.path}: DALI could not decode frames {segments[0].indices[0]} to "
                f"{segments[-1].indices[-1]} ({' '.join(str(error).split())}), expected an "
                "undamaged video; copy it again, or decode with data.decode.backend=pyav"
            ) from error
        self._pipeline = pipeline
        return frames

    def _finish(
        self, runs: Sequence[FrameRuns], decoded: Future[list[Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield a round's frames, ready for the caller's current stream."""
        for frame_runs, frames in zip(runs, decoded.result(), strict=True):
            # Their memory belongs to the stream that filled it, and must outlast what reads it.
            frames.record_stream(torch.cuda.current_stream(self._device))
            yield from zip(frame_runs.indices, frames.unbind(), strict=True)


def _as_shown(frames: Tensor, segment: Segment, info: VideoInfo) -> Tensor:
    """Crop decoded frames, correct their colours and rotate them upright."""
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


class _RoundDecoder:
    """A pipeline that takes several containers at once; one thread uses it at a time."""

    def __init__(self, device: torch.device, num_streams: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pipeline = Pipeline(
            batch_size=num_streams,
            num_threads=num_streams,
            device_id=device.index,
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            container = fn.external_source(name="container", dtype=types.UINT8, ndim=1)
            places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
            # With "none" an index past the end fails instead of giving a black frame.
            frames = fn.decoders.video(container, device="mixed", frames=places, pad_mode="none")
            self._pipeline.set_outputs(frames)
        self._pipeline.build()

    def __call__(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Return the wanted frames as stored; this object's stream is the current one."""
        containers = [np.frombuffer(segment.container, dtype=np.uint8) for segment in segments]
        places = [np.array(segment.places, dtype=np.int32) for segment in segments]
        self._pipeline.feed_input("container", containers)
        self._pipeline.feed_input("places", places)
        try:
            (batch,) = self._pipeline.run()
        except RuntimeError:
            # What it has begun must end before another pipeline takes its memory.
            torch.cuda.synchronize(self.stream.device)
            raise
        copies = []
        for decoded in batch:
            frames = torch.empty(decoded.shape(), dtype=torch.uint8, device=self.stream.device)
            feed_ndarray(decoded, frames, cuda_stream=self.stream)
            copies.append(frames)
        # The copies only begin here, and what was decoded may be overwritten once it is let go.
        self.stream.synchronize()
        return copies
