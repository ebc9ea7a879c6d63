# SPDX-License-Identifier: Apache-2.0
"""The interface of decoders, which return a file's upright frames by index, and their choice.

Decoders on the CPU and the GPU return the same frames, so their callers need not know which it is.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import PyavDecoder
from megatron_keye.data.video.video_info import VideoInfo


class FrameDecoder(Protocol):
    """Decodes videos on one device."""

    @property
    def device(self) -> torch.device:
        """Where the frames are."""

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, frame) once for each distinct index, in presentation order.

        Args:
            path: Video file.
            indices: Indices into `probe(path).times`.

        Returns:
            Pairs of index and uint8 RGB [height, width, 3], upright, on `device`. Closing the
            iterator early lets go of the file.

        Raises:
            UserError: Naming the file: unreadable, an index that is negative or past its end, or
                wanted frames that do not decode.
        """

    def close(self) -> None:
        """Let go of threads and devices; the decoder is unusable afterwards."""


def make_decoder(
    backend: Literal["pyav", "dali"],
    device: torch.device,
    num_threads: int,
    probe_video: Callable[[Path], VideoInfo] = probe,
) -> FrameDecoder:
    """Return the decoder that the run chose.

    Args:
        backend: From `config.backends.decode_backend`.
        device: Of the rank, where dali decodes.
        num_threads: The run's data.decode.num_threads.
        probe_video: Tells what a file holds; raises what `probe` raises.
    """
    if backend == "pyav":
        return PyavDecoder(num_threads, probe_video)
    from megatron_keye.data.video.dali import DEFAULT_STREAMS, DaliDecoder

    return DaliDecoder(device, num_threads or DEFAULT_STREAMS, probe_video)
