# SPDX-License-Identifier: Apache-2.0
"""What is known of a video before decoding: its frames, their times, and where decoding begins.

It is all that decoders need besides the packets themselves, so it is made once, by one process,
and kept with prepared samples.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_keye.errors import UserError

type Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EntryPoints:
    """Packets where decoding can begin, in stored order; all arrays are [entry points].

    A decoder that begins at one gives the very frames that decoding the whole file gives, from
    `exact_packets` and `first_frames` on. Both ascend.
    """

    packets: Integers
    """Number of the packet."""
    exact_packets: Integers
    """The first packet whose frame is exact; a later one where H.264 refreshes its picture."""
    first_frames: Integers
    """The first frame, in presentation order, that is exact."""
    resets: Integers
    """1 for a random access point, where even a GPU's decoder can begin."""
    anchors: Integers
    """The packet itself, or the last one in front of it, of which the container says where it
    begins; -1 if it says that of none."""
    positions: Integers
    """Byte of the file where the anchor begins."""
    timestamps: Integers
    """Time of the packet's frame, in units of the stream."""
    decode_timestamps: Integers
    """When the packet is to be decoded, likewise."""
    checksums: Integers
    """CRC-32 of the packet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoInfo:
    """A video file before decoding."""

    path: Path
    """File."""
    timestamps: Integers
    """When each frame is shown, in units of the stream, ascending [frames]."""
    time_base: Fraction
    """Seconds of such a unit."""
    start_seconds: float
    """Time that counts as zero: a positive start offset of the whole container, as MPEG-TS has,
    is taken off, as players do."""
    packet_sizes: Integers
    """Bytes of each packet, in stored order [packets]."""
    packet_frames: Integers
    """Index of the frame that a packet holds, -1 for one that is never shown [packets]."""
    entries: EntryPoints
    """Where decoding can begin; each frame comes exactly from one of them at least."""
    color_space: int
    """FFmpeg's number of the rule by which luma and colour differences become RGB."""
    gpu_unsupported_reason: str
    """Why a GPU would not decode this file correctly, "" if it would."""
    height: int
    """Pixels down, as shown."""
    width: int
    """Pixels across, as shown; stored pixels, the sample aspect ratio is not applied."""
    rotation: int
    """Degrees counter-clockwise, 0, 90, 180 or 270, by which stored frames are rotated."""
    is_mirrored: bool
    """Whether stored frames are flipped left to right before they are rotated."""

    @property
    def num_frames(self) -> int:
        """Frames in the file."""
        return len(self.timestamps)

    @cached_property
    def times(self) -> NDArray[np.float64]:
        """When each frame is shown, in seconds, ascending and not below zero [frames]."""
        times = self.timestamps * np.float64(self.time_base) - self.start_seconds
        times.setflags(write=False)
        return times

    @cached_property
    def frame_packets(self) -> Integers:
        """Number of the packet that holds each frame [frames]."""
        shown = np.flatnonzero(self.packet_frames >= 0)
        packets = np.empty(self.num_frames, dtype=np.int64)
        packets[self.packet_frames[shown]] = shown
        return packets

    @cached_property
    def random_access_points(self) -> Integers:
        """Frames where a decoder without any state can begin, ascending.

        Each later frame is decoded correctly; frames shown before one, but stored after it, are
        not.
        """
        frames = self.packet_frames[self.entries.packets[self.entries.resets == 1]]
        return np.asarray(frames[frames >= 0], dtype=np.int64)

    def entry_before(self, frames: Sequence[int]) -> int:
        """Return the last entry point from which all of these frames are decoded exactly."""
        wanted = np.asarray(frames, dtype=np.int64)
        by_order = np.searchsorted(
            self.entries.exact_packets, self.frame_packets[wanted], side="right"
        )
        by_time = np.searchsorted(self.entries.first_frames, wanted, side="right")
        return int(np.minimum(by_order, by_time).min()) - 1

    def to_bytes(self) -> bytes:
        """Return everything but the path, compressed."""
        arrays = [
            self.timestamps,
            self.packet_sizes,
            # How far each frame is from its packet, mostly by a few places.
            self.packet_frames - np.arange(len(self.packet_frames)),
            *(getattr(self.entries, field.name) for field in fields(EntryPoints)),
        ]
        described = {name: value for name, value in vars(self).items() if name in _SCALARS}
        described["time_base"] = [self.time_base.numerator, self.time_base.denominator]
        header = json.dumps(described | {"lengths": list(map(len, arrays))}).encode()
        deltas = [np.diff(array, prepend=0).astype("<i8").tobytes() for array in arrays]
        return zlib.compress(b"".join([len(header).to_bytes(4, "little"), header, *deltas]), 6)

    @classmethod
    def from_bytes(cls, path: Path, content: bytes) -> Self:
        """Read what `to_bytes` returned.

        Args:
            path: Where the file is now.
            content: What `to_bytes` returned.

        Raises:
            UserError: Naming the file, when the content is damaged.
        """
        try:
            described, arrays = _unpacked(content)
            return cls(path=path, **arrays, **described)
        except (zlib.error, ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise UserError(
                f"{path}: what was kept of its frames is damaged ({error}); prepare it again"
            ) from error


def _unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plain fields of what `to_bytes` returned, and its arrays."""
    plain = zlib.decompress(content)
    start = 4 + int.from_bytes(plain[:4], "little")
    described: dict[str, Any] = json.loads(plain[4:start])
    numbers = np.frombuffer(plain, dtype="<i8", offset=start)
    parts = np.split(numbers, np.cumsum(described.pop("lengths"))[:-1])
    arrays = [np.cumsum(part) for part in parts]
    arrays[2] += np.arange(len(arrays[2]))
    for array in arrays:
        array.setflags(write=False)
    names = [field.name for field in fields(EntryPoints)]
    described["time_base"] = Fraction(*described["time_base"])
    return described, {
        "timestamps": arrays[0],
        "packet_sizes": arrays[1],
        "packet_frames": arrays[2],
        "entries": EntryPoints(**dict(zip(names, arrays[3:], strict=True))),
    }


_SCALARS = frozenset(
    {"start_seconds", "color_space", "gpu_unsupported_reason", "height", "width", "rotation"}
    | {"is_mirrored"}
)
