# SPDX-License-Identifier: Apache-2.0
"""A sample source that reads prepared tokens from a zarr store, without tokenizing or probing.

Bounds and what identifies media files stay in memory, 32 bytes per sample, 4 per medium of a
sample and 33 per file; names are read when a file is first used, tokens for whole rows at once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from megatron_keye.data.media import FileIdentity, Medium, MediumKind, is_remote, locate_media
from megatron_keye.data.reading import reading
from megatron_keye.data.row import Picture, Sample, labels_of
from megatron_keye.data.store.array import StoredArray
from megatron_keye.data.store.settings import check_settings
from megatron_keye.data.store.writer import FORMAT
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

_PATHS_KEPT = 65_536
_CHUNKS_PER_READ = 64
"""One shard of tokens at most, 32 MB in memory."""


class SampleStore:
    """A store made by `megatron-keye prepare`.

    Args:
        path: Its folder.
        settings: Settings of this run that decide tokens, from `deciding_settings`.

    Raises:
        UserError: For a folder that is no finished store, or one prepared under other settings,
            naming each that differs.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        attributes = _open(path)
        check_settings(path, attributes["settings"], settings)
        self.path = path
        self.attributes = attributes
        """Attributes of the store: totals, settings, sample file."""
        self.digest: str = attributes["digest"]
        self.num_samples: int = attributes["num_samples"]
        self.unread: Mapping[str, int] = attributes["unread"]
        self._base = (path.resolve().parent / attributes["media_base"]).resolve()
        self._lines = _whole(path, "samples/lines", self.num_samples)
        self._token_bounds = _bounds(path, "samples/token_bounds", self.num_samples)
        self._picture_bounds = _bounds(path, "samples/picture_bounds", self.num_samples)
        self._media_bounds = _bounds(path, "samples/media_bounds", self.num_samples)
        self._tokens = StoredArray(path, "tokens", int(self._token_bounds[-1]))
        self._pictures = StoredArray(path, "pictures", int(self._picture_bounds[-1]))
        self._shown_media = _whole(path, "samples/media", int(self._media_bounds[-1]))
        num_media: int = attributes["num_media"]
        self._name_bounds = _bounds(path, "media/name_bounds", num_media)
        self._is_video = _whole(path, "media/is_video", num_media)
        self._sizes = _whole(path, "media/size_bytes", num_media)
        self._modified = _whole(path, "media/modified_nanoseconds", num_media)
        self._video_info_bounds = _bounds(path, "media/video_info_bounds", num_media)
        # Most of the bytes; read when a file is used for the first time, which takes about 1 ms.
        self._names = StoredArray(path, "media/names", int(self._name_bounds[-1]))
        self._keys = StoredArray(path, "media/content_keys", num_media)
        num_bytes = int(self._video_info_bounds[-1])
        self._video_infos = StoredArray(path, "media/video_infos", num_bytes)
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._medium = lru_cache(_PATHS_KEPT)(self._find_medium)

    def name(self, index: int) -> str:
        """Return the file and line that a sample was made from."""
        return f"{self.attributes['sample_file']}:{self._lines[index]}"

    def measure(self, index: int) -> int:
        """Return a sample's length in tokens.

        Raises:
            UserError: Naming a media file that is missing or has changed since the store was
                made.
        """
        first, end = self._media_bounds[index : index + 2]
        for medium in self._shown_media[first:end].tolist():
            try:
                self._medium(medium)
            except UserError as error:
                raise UserError(f"{self.name(index)}: {error}") from error
        start, stop = self._token_bounds[index : index + 2]
        return int(stop - start)

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples in the order asked for, with one read for all of them.

        Raises:
            UserError: As `measure`.
        """
        tokens = _gather(self._tokens, self._token_bounds, indices)
        pictures = _gather(self._pictures, self._picture_bounds, indices)
        return [
            self._sample(index, pairs, rows)
            for index, pairs, rows in zip(indices, tokens, pictures, strict=True)
        ]

    def _sample(
        self, index: int, pairs: NDArray[np.int32], pictures: NDArray[np.float64]
    ) -> Sample:
        token_ids = pairs[:, 0].astype(np.int64)
        # The second column has the bits of a float32.
        weights = pairs[:, 1].copy().view(np.float32)
        return Sample(
            name=self.name(index),
            token_ids=token_ids,
            labels=labels_of(token_ids, weights),
            weights=weights,
            pictures=tuple(map(self._picture, pictures.tolist())),
            picture_starts=tuple(pictures[:, 4].astype(np.int64).tolist()),
        )

    def video_info(self, path: Path) -> VideoInfo | None:
        """Return what was probed of a video that was loaded lately; None for any other file.

        Of a remote one there is no answer: it is asked for by the path of its copy.
        """
        number = self._numbers.get(str(path))
        if number is None:
            return None
        start, stop = self._video_info_bounds[number : number + 2]
        return VideoInfo.from_bytes(path, self._video_infos[start:stop].tobytes())

    def _picture(self, row: list[float]) -> Picture:
        number, frame, down, across = map(int, row[:4])
        medium = self._medium(number)
        if medium.kind == "video":
            self._numbers[medium.path] = number
            self._numbers.move_to_end(medium.path)
            if len(self._numbers) > _PATHS_KEPT:
                self._numbers.popitem(last=False)
        return Picture(
            medium=medium,
            frame=frame,
            patch_grid=(down, across),
            seconds=None if np.isnan(row[5]) else row[5],
        )

    def _find_medium(self, number: int) -> Medium:
        """Return a media file after checking that it has not changed, if it is on this machine."""
        start, stop = self._name_bounds[number : number + 2]
        location = locate_media(self._names[start:stop].tobytes().decode(), self._base)
        kind: MediumKind = "video" if self._is_video[number] else "image"
        if is_remote(location):
            return Medium(location, kind, content_key=self._content_key(number).hex())
        self._check_unchanged(number, Path(location))
        return Medium(location, kind)

    def _check_unchanged(self, number: int, path: Path) -> None:
        """Check a file; the key of its content is read only if it was copied or changed."""
        with reading(path, "a media file"):
            status = path.stat()
        size_bytes, modified = int(self._sizes[number]), int(self._modified[number])
        if (status.st_size, status.st_mtime_ns) == (size_bytes, modified):
            return
        identity = FileIdentity(
            size_bytes=size_bytes,
            modified_nanoseconds=modified,
            content_key=self._content_key(number),
        )
        if not identity.matches(path):
            raise UserError(
                f"{path}: has changed since {self.path} was made, expected {size_bytes} bytes of "
                "the same content; restore the file, or prepare the samples again"
            )

    def _content_key(self, number: int) -> bytes:
        return self._keys[number : number + 1].tobytes()


def _open(path: Path) -> dict[str, Any]:
    """Return the attributes of a finished store; refuse anything else."""
    if not (path / "zarr.json").is_file():
        raise UserError(
            f"data.samples: {path} is a folder but no store, expected one made by "
            "megatron-keye prepare; a folder that ends in .partial is continued by the same "
            "command"
        )
    with reading(path, "a store of prepared samples"):
        attributes = dict(zarr.open_group(path, mode="r", zarr_format=3).attrs)
    if attributes.get("format") != FORMAT:
        raise UserError(
            f"data.samples: {path} has the format {attributes.get('format')!r}, expected "
            f"{FORMAT!r}; prepare the samples again"
        )
    return attributes


def _whole(store: Path, name: str, num_rows: int) -> NDArray[Any]:
    return StoredArray(store, name, num_rows)[:]


def _bounds(store: Path, name: str, num_parts: int) -> NDArray[np.int64]:
    return _whole(store, name, num_parts + 1)


def _gather(array: Any, bounds: NDArray[np.int64], indices: Sequence[int]) -> list[NDArray[Any]]:
    """Read the rows of several samples, neighbours in one request.

    Requests are slices: given single positions, zarr spends longer on sorting than on reading.
    """
    found: list[NDArray[Any]] = [np.empty(0)] * len(indices)
    for group in _neighbours(bounds, indices, array.chunks[0]):
        first = int(bounds[indices[group[0]]])
        values = array[first : int(bounds[indices[group[-1]] + 1])]
        for position in group:
            start, stop = bounds[indices[position] : indices[position] + 2] - first
            # A copy, so that the rows between samples are freed.
            found[position] = values[start:stop].copy()
    return found


def _neighbours(
    bounds: NDArray[np.int64], indices: Sequence[int], chunk_length: int
) -> Iterator[list[int]]:
    """Group positions in `indices`, in sample order, that lie in the same or the next chunk."""
    group: list[int] = []
    for position in np.argsort(indices, kind="stable").tolist():
        start, stop = bounds[indices[position] : indices[position] + 2].tolist()
        if group:
            first, end = int(bounds[indices[group[0]]]), int(bounds[indices[group[-1]] + 1])
            is_near = start // chunk_length <= end // chunk_length + 1
            if not is_near or stop - first > _CHUNKS_PER_READ * chunk_length:
                yield group
                group = []
        group.append(position)
    if group:
        yield group
