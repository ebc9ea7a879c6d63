# SPDX-License-Identifier: Apache-2.0
"""Metadata of a block of tokenized samples: lines, lengths, pictures and media files.

Written by the worker processes that tokenize, read by the process that merges blocks into a store.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

import numpy as np

from megatron_keye.config import RemoteConfig
from megatron_keye.data.media import FileIdentity, Medium, identify
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.data.row import Picture, Sample
from megatron_keye.data.video.probe_cache import ProbeCache


@dataclass(frozen=True, kw_only=True)
class StoredMedium(FileIdentity):
    """A media file that samples use, and its identity when it was read."""

    name: str
    """Name as written in the sample file."""
    is_video: bool
    """Whether it is a video, or an image or one frame of a video."""
    seconds: float
    """From the first to the last frame; 0 for an image."""
    video_info: bytes
    """What was probed of a video, by `VideoInfo.to_bytes`; empty for an image."""


@dataclass
class BlockMetadata:
    """Metadata of samples, in order; grows sample by sample."""

    line_numbers: list[int] = field(default_factory=list)
    """Line of each sample."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample."""
    picture_counts: list[int] = field(default_factory=list)
    """Pictures of each sample."""
    pictures: list[tuple[float, ...]] = field(default_factory=list)
    """Of each picture: its medium, its frame, patches down and across, the position of its first
    placeholder in its sample, and when it is shown, in seconds, NaN for an image."""
    media: list[StoredMedium] = field(default_factory=list)
    """Files, as `pictures` numbers them."""
    _numbers: dict[Medium, int] = field(default_factory=dict)

    def add(
        self,
        sample: Sample,
        line: int,
        names: Mapping[str, str],
        probes: ProbeCache,
        remote: RemoteConfig,
    ) -> None:
        """Add a sample.

        Args:
            sample: The sample.
            line: Its line number.
            names: Name of each media file as written in the sample file, by path or URL.
            probes: Cached probe results of videos.
            remote: Where copies of remote files are kept.
        """
        numbers = [self._number(picture, names, probes, remote) for picture in sample.pictures]
        self.line_numbers.append(line)
        self.lengths.append(len(sample.token_ids))
        self.picture_counts.append(len(sample.pictures))
        for number, picture, start in zip(
            numbers, sample.pictures, sample.picture_starts, strict=True
        ):
            seconds = np.nan if picture.seconds is None else picture.seconds
            self.pictures.append((number, picture.frame, *picture.patch_grid, start, seconds))

    def _number(
        self, picture: Picture, names: Mapping[str, str], probes: ProbeCache, remote: RemoteConfig
    ) -> int:
        """Return the number of a picture's file in `media`, appending a new file."""
        key = picture.medium
        if key not in self._numbers:
            seconds, video_info = 0.0, b""
            with local_copy(key, remote) as path:
                identity = identify(path)
                if key.kind == "video":
                    info = probes.probe(path)
                    seconds, video_info = float(info.times[-1] - info.times[0]), info.to_bytes()
            self.media.append(
                StoredMedium(
                    name=names[key.path],
                    is_video=key.kind == "video",
                    seconds=seconds,
                    video_info=video_info,
                    **vars(identity),
                )
            )
            self._numbers[key] = len(self.media) - 1
        return self._numbers[key]

    def to_bytes(self) -> bytes:
        """Return everything as an .npz archive."""
        media = [
            asdict(medium)
            | {
                "content_key": medium.content_key.hex(),
                "video_info": len(medium.video_info),
            }
            for medium in self.media
        ]
        video_infos = b"".join(medium.video_info for medium in self.media)
        stream = io.BytesIO()
        np.savez(
            stream,
            samples=np.array(
                [self.line_numbers, self.lengths, self.picture_counts], dtype=np.int64
            ),
            pictures=np.array(self.pictures, dtype=np.float64).reshape(-1, 6),
            media=np.frombuffer(json.dumps(media).encode(), dtype=np.uint8),
            video_infos=np.frombuffer(video_infos, dtype=np.uint8),
        )
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read what `to_bytes` returned."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            lines, lengths, counts = arrays["samples"].tolist()
            pictures = [tuple(row) for row in arrays["pictures"].tolist()]
            media = json.loads(arrays["media"].tobytes())
            video_infos = io.BytesIO(arrays["video_infos"].tobytes())
        return cls(
            line_numbers=lines,
            lengths=lengths,
            picture_counts=counts,
            pictures=pictures,
            media=[
                StoredMedium(
                    **described
                    | {
                        "content_key": bytes.fromhex(described["content_key"]),
                        "video_info": video_infos.read(described["video_info"]),
                    }
                )
                for described in media
            ],
        )
