# SPDX-License-Identifier: Apache-2.0
"""Decodes ahead of the encoder, in a thread of its own, as far as its limits allow.

Training takes chunks in the order that was announced and finds them ready, unless decoding is
slower than the step; the statistics show which.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_keye.config import DecodeConfig, RemoteConfig, VisionConfig
from megatron_keye.data.remote.copies import NO_REMOTE
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks, patch_bytes
from megatron_keye.data.video.frame_decoder import FrameDecoder
from megatron_keye.data.video.patches import normalise, to_bytes
from megatron_keye.errors import UserError

_CLOSING_SECONDS = 5.0
"""How long closing waits for the frame that is being decoded."""


@dataclass(frozen=True, kw_only=True)
class DecodeStatistics:
    """What happened since statistics were taken last."""

    pictures: int = 0
    """Images and frames decoded."""
    busy_seconds: float = 0.0
    """Time that the thread spent decoding."""
    takes: int = 0
    """Chunks that the encoder took."""
    ready_chunks: int = 0
    """Chunks that were ready when the encoder asked, summed over `takes`."""


class DecodeService:
    """Decodes announced chunks in order and keeps them until they are taken.

    Args:
        decoder: Gives the frames of videos; closed together with the service.
        vision: Patch and merge size.
        config: Limits.
        remote: Where copies of remote files are kept; by default such files are refused.
        skips_bad: Whether pictures of files that cannot be decoded become grey. Ranks then agree
            before a step on what failed, so whole steps are decoded ahead whatever the limits, and
            wait in main memory, a byte for each value.
    """

    def __init__(
        self,
        decoder: FrameDecoder,
        vision: VisionConfig,
        config: DecodeConfig,
        *,
        remote: RemoteConfig = NO_REMOTE,
        skips_bad: bool = False,
    ) -> None:
        self._decoder, self._vision, self._config = decoder, vision, config
        self._remote, self._skips_bad = remote, skips_bad
        self._changed = threading.Condition()
        # All below is read and written while `_changed` is held.
        self._announced: deque[Sequence[Sequence[Picture]]] = deque()
        self._ready: deque[Tensor] = deque()
        self._num_due = 0
        self._failed: dict[str, str] = {}
        self._finished: deque[dict[str, str]] = deque()
        self._error: Exception | None = None
        self._is_closing = False
        self._working_on = ""
        self._working_since = 0.0
        self._counts = DecodeStatistics()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)

    def __enter__(self) -> Self:
        """Return the service, whose thread starts with the first step."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        """Announce the chunks of one more step, behind all that were announced before.

        Args:
            chunks: In the order in which they will be taken.
        """
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            self._announced.append(chunks)
            self._num_due += len(chunks)
            self._changed.notify_all()

    def wait_until_decoded(self) -> dict[str, str]:
        """Wait until the next step that was announced is decoded as a whole.

        Only with `skips_bad`; to be asked once for each step, before its chunks are taken.

        Returns:
            The files of the step that could not be decoded, and why.

        Raises:
            UserError: As `take`, for a file that hangs.
        """
        assert self._skips_bad, "without skipping, steps are not decoded as a whole"
        with self._changed:
            while not self._finished:
                if self._error is not None:
                    raise self._error
                self._changed.wait(self._seconds_left())
            return self._finished.popleft()

    def take(self) -> Tensor:
        """Return the patches of the next chunk, waiting for them if need be.

        Returns:
            float32 [P, 3, patch_size, patch_size] on the decoder's device, complete.

        Raises:
            UserError: Naming the file that could not be decoded, or that gave nothing within
                data.decode.timeout_seconds. The service is unusable afterwards.
        """
        with self._changed:
            assert self._num_due > 0, "no chunk was announced that has not been taken"
            self._count(takes=1, ready_chunks=len(self._ready))
            while not self._ready:
                if self._error is not None:
                    raise self._error
                self._changed.wait(self._seconds_left())
            patches = self._ready.popleft()
            self._num_due -= 1
            self._changed.notify_all()
        if self._skips_bad:
            return normalise(patches.to(self._decoder.device))
        if patches.device.type == "cuda":
            # Filled on the thread's stream; it must outlast what this stream does with it.
            patches.record_stream(torch.cuda.current_stream(patches.device))
        return patches

    def statistics(self) -> DecodeStatistics:
        """Return what was counted since the last call."""
        with self._changed:
            counts, self._counts = self._counts, DecodeStatistics()
        return counts

    def close(self) -> None:
        """Stop decoding and end the thread; chunks that were not taken are dropped.

        A thread that hangs in a file is left behind, and ends with the process.
        """
        with self._changed:
            self._is_closing = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_CLOSING_SECONDS)
        if not self._thread.is_alive():
            self._decoder.close()

    def _count(self, **more: float) -> None:
        counts = vars(self._counts)
        self._counts = DecodeStatistics(
            **(counts | {name: counts[name] + number for name, number in more.items()})
        )

    def _seconds_left(self) -> float | None:
        """Return how long the file that is being decoded may still take, None when none is."""
        if not self._working_on:
            return None
        limit = self._config.timeout_seconds
        left = self._working_since + limit - time.monotonic()
        if left <= 0:
            self._error = UserError(
                f"{self._working_on}: gave no frame for {limit:g} s, expected one within "
                "data.decode.timeout_seconds; see whether its file system answers, raise the "
                "limit, or drop the sample"
            )
            raise self._error
        return left

    def _work(self) -> None:
        """Decode until closed or until a file fails; the thread's whole life."""
        try:
            if self._decoder.device.type == "cuda":
                torch.cuda.set_device(self._decoder.device)
                with torch.cuda.stream(torch.cuda.Stream(self._decoder.device)):
                    self._decode_announced()
            else:
                self._decode_announced()
        except Exception as error:
            with self._changed:
                # What a file raises after its timeout changes nothing.
                self._error = self._error or error
                self._working_on = ""
                self._changed.notify_all()

    def _decode_announced(self) -> None:
        while (chunks := self._next_step()) is not None:
            patches = decode_chunks(
                chunks,
                self._decoder,
                self._vision,
                remote=self._remote,
                watch=self._watch,
                on_failure=self._note_failure if self._skips_bad else None,
            )
            with closing(patches) as decoded:
                for pictures in chunks:
                    if not self._has_room_for(pictures):
                        return
                    self._decode_one(decoded, len(pictures))
            if self._skips_bad:
                self._finish_step()

    def _next_step(self) -> Sequence[Sequence[Picture]] | None:
        """Wait for the next step; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._announced or self._is_closing)
            return None if self._is_closing else self._announced.popleft()

    def _has_room_for(self, pictures: Sequence[Picture]) -> bool:
        """Wait until a chunk fits beside those that are ready; False when closed."""
        size = patch_bytes(pictures, self._vision)

        def fits() -> bool:
            held = sum(patches.nbytes for patches in self._ready)
            limit = self._config.max_ahead_mebibytes * 2**20
            has_place = len(self._ready) < self._config.max_ahead_chunks
            is_within = has_place and held + size <= limit
            return self._skips_bad or not self._ready or is_within

        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or fits())
            return not self._is_closing

    def _decode_one(self, decoded: Iterator[Tensor], num_pictures: int) -> None:
        started = time.monotonic()
        patches = next(decoded)
        if self._skips_bad:
            patches = to_bytes(patches).cpu()
        if patches.device.type == "cuda":
            torch.cuda.current_stream(patches.device).synchronize()
        with self._changed:
            self._working_on = ""
            self._count(pictures=num_pictures, busy_seconds=time.monotonic() - started)
            self._ready.append(patches)
            self._changed.notify_all()

    def _note_failure(self, media: str, error: UserError) -> None:
        """Note that a file of the step that is being decoded failed."""
        with self._changed:
            self._failed[media] = str(error)

    def _finish_step(self) -> None:
        """Hand over what failed in the step that is decoded now."""
        with self._changed:
            self._finished.append(self._failed)
            self._failed = {}
            self._changed.notify_all()

    def _watch(self, media: str) -> None:
        """Note which file is waited for, and since when."""
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the decode service was closed")
            self._working_on, self._working_since = media, time.monotonic()
            # Waiting threads must learn of the new limit.
            self._changed.notify_all()
