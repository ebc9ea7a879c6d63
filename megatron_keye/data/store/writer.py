# SPDX-License-Identifier: Apache-2.0
"""Merges blocks into one zarr store: a few long arrays in large files.

Arrays grow shard by shard, so that memory does not grow with the store, apart from the list of
distinct media files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import ZstdCodec

from megatron_keye.data.store.array import ARRAYS
from megatron_keye.data.store.block_metadata import BlockMetadata, StoredMedium
from megatron_keye.errors import UserError

FORMAT = "megatron_keye.samples.2"
REFUSED = "refused.txt"
"""File in the store that lists the lines left out, and why."""
# Reading costs about 1 ms for each chunk touched, whatever its length.
_CHUNK_LENGTH = 65_536
_SHARD_LENGTH = 64 * _CHUNK_LENGTH


class Appender:
    """Appends to one array, a whole shard at a time."""

    def __init__(self, group: zarr.Group, name: str) -> None:
        dtype, row = ARRAYS[name]
        self._array = group.create_array(
            name,
            shape=(0, *row),
            dtype=dtype,
            chunks=(_CHUNK_LENGTH, *row),
            shards=(_SHARD_LENGTH, *row),
            compressors=[ZstdCodec(level=1, checksum=True)],
            # A file of zeros alone is written too, so that a file that is lost can be told.
            config={"write_empty_chunks": True},
        )
        self._buffer = np.empty((_SHARD_LENGTH, *row), dtype=dtype)
        self._num_buffered = 0
        self.last = 0
        """The last bound, for arrays of bounds."""
        if name.endswith("_bounds"):
            self.append([0])

    def append(self, values: ArrayLike) -> None:
        """Append rows; whole chunks are written at once."""
        rest = np.asarray(values, dtype=self._buffer.dtype).reshape(-1, *self._buffer.shape[1:])
        while len(rest):
            taken = rest[: len(self._buffer) - self._num_buffered]
            rest = rest[len(taken) :]
            self._buffer[self._num_buffered : self._num_buffered + len(taken)] = taken
            self._num_buffered += len(taken)
            if self._num_buffered == len(self._buffer):
                self.flush()

    def append_lengths(self, lengths: Sequence[int]) -> None:
        """Append the bounds of parts of these lengths."""
        bounds = self.last + np.cumsum(lengths, dtype=np.int64)
        self.append(bounds)
        self.last = int(bounds[-1]) if len(bounds) else self.last

    def flush(self) -> None:
        """Write what is left."""
        start = self._array.shape[0]
        end = start + self._num_buffered
        self._array.resize((end, *self._array.shape[1:]))
        self._array[start:end] = self._buffer[: self._num_buffered]
        self._num_buffered = 0


class _StoreWriter:
    """Appends blocks and numbers media files across the whole store."""

    def __init__(self, folder: Path) -> None:
        self.group = zarr.open_group(folder, mode="w", zarr_format=3)
        self._arrays = {name: Appender(self.group, name) for name in ARRAYS}
        self.media: list[StoredMedium] = []
        self._numbers: dict[tuple[str, bool], int] = {}

    def add_block(self, path: Path, num_tokens: int) -> None:
        """Append the samples of one block."""
        with path.open("rb") as stream:
            for start in range(0, num_tokens, _CHUNK_LENGTH):
                count = 2 * min(_CHUNK_LENGTH, num_tokens - start)
                self._append("tokens", np.fromfile(stream, dtype="<i4", count=count))
            metadata = BlockMetadata.from_bytes(stream.read())
        pictures = np.array(metadata.pictures, dtype=np.float64).reshape(-1, 6)
        numbers = np.array([self._number(medium) for medium in metadata.media], dtype=np.int32)
        media = numbers[pictures[:, 0].astype(np.int64)]
        pictures[:, 0] = media
        ends = np.cumsum(metadata.picture_counts)
        used = [np.unique(part) for part in np.split(media, ends[:-1])]
        if ends.size:
            self._append("samples/media", np.concatenate(used))
        self._arrays["samples/media_bounds"].append_lengths([len(part) for part in used])
        self._arrays["samples/token_bounds"].append_lengths(metadata.lengths)
        self._arrays["samples/picture_bounds"].append_lengths(metadata.picture_counts)
        self._append("samples/lines", metadata.line_numbers)
        self._append("pictures", pictures)

    def finish(self) -> None:
        """Append the media files and flush all arrays."""
        names = [medium.name.encode() for medium in self.media]
        self._arrays["media/name_bounds"].append_lengths([len(name) for name in names])
        self._append("media/names", np.frombuffer(b"".join(names), dtype=np.uint8))
        self._append("media/is_video", [medium.is_video for medium in self.media])
        for field in ("seconds", "size_bytes", "modified_nanoseconds"):
            self._append(f"media/{field}", [getattr(medium, field) for medium in self.media])
        keys = b"".join(medium.content_key for medium in self.media)
        self._append("media/content_keys", np.frombuffer(keys, dtype=np.uint8))
        for array in self._arrays.values():
            array.flush()

    def _append(self, name: str, values: ArrayLike) -> None:
        self._arrays[name].append(values)

    def _number(self, medium: StoredMedium) -> int:
        key = medium.name, medium.is_video
        if key not in self._numbers:
            self._numbers[key] = len(self.media)
            self._append("media/video_infos", np.frombuffer(medium.video_info, dtype=np.uint8))
            self._arrays["media/video_info_bounds"].append_lengths([len(medium.video_info)])
            self.media.append(replace(medium, video_info=b""))
        number = self._numbers[key]
        if self.media[number].content_key != medium.content_key:
            raise UserError(
                f"{medium.name}: changed while the store was made, expected the same file for all "
                "samples; remove the folder that ends in .partial and prepare again"
            )
        return number


def write_store(
    folder: Path,
    blocks: Mapping[Path, Mapping[str, Any]],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a store, over anything that an earlier attempt left in its folder.

    Args:
        folder: Target folder; incomplete until this returns.
        blocks: Files that `BlockMaker.fill` wrote, in order, and what it returned for each.
        attributes: What readers need beside arrays and totals.

    Returns:
        Totals: num_samples, num_tokens, num_pictures, longest, num_media, video_seconds,
        num_refused, and samples by what was not read of them.

    Raises:
        UserError: Naming a media file that changed between blocks.
    """
    writer = _StoreWriter(folder)
    refused: list[str] = []
    unread: Counter[str] = Counter()
    for path, record in blocks.items():
        writer.add_block(path, record["num_tokens"])
        unread.update(record["unread"])
        refused += record["refused"]
    writer.finish()
    (folder / REFUSED).write_text("".join(f"{reason}\n" for reason in refused))
    totals = {
        name: sum(record[name] for record in blocks.values())
        for name in ("num_samples", "num_tokens", "num_pictures")
    }
    totals |= {
        "longest": max(record["longest"] for record in blocks.values()),
        "num_media": len(writer.media),
        "video_seconds": sum(medium.seconds for medium in writer.media),
        "num_refused": len(refused),
        "unread": dict(unread),
    }
    content = json.dumps([attributes, totals, refused], sort_keys=True).encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    writer.group.attrs.put({"format": FORMAT, "digest": digest, **attributes, **totals})
    return totals
