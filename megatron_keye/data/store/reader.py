"""A sample source that reads prepared tokens from a zarr store, without tokenizing or probing.

Bounds and what identifies media files stay in memory, 32 bytes per sample, 4 per medium of a
sample and 25 per file; names are read when a file is first used, tokens for whole rows at once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from megatron_keye.data.media import FileIdentity, Medium, resolve_media
from megatron_keye.data.row import Picture, Sample, labels_of
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
        group, attributes = _open(path)
        check_settings(path, attributes["settings"], settings)
        self.path = path
        self.attributes = attributes
        """Attributes of the store: totals, settings, sample file."""
        self.digest: str = attributes["digest"]
        self.num_samples: int = attributes["num_samples"]
        self.unread: Mapping[str, int] = attributes["unread"]
        self._base = (path.resolve().parent / attributes["media_base"]).resolve()
        self._tokens, self._pictures = _array(group, "tokens"), _array(group, "pictures")
        self._lines = _whole(group, "samples/lines")
        self._token_bounds = _whole(group, "samples/token_bounds")
        self._picture_bounds = _whole(group, "samples/picture_bounds")
        self._media_bounds = _whole(group, "samples/media_bounds")
        self._shown_media = _whole(group, "samples/media")
        # Most of the bytes; read when a file is used for the first time, which takes about 1 ms.
        self._names = _array(group, "media/names")
        self._keys = _array(group, "media/content_keys")
        self._name_bounds = _whole(group, "media/name_bounds")
        self._is_video = _whole(group, "media/is_video")
        self._sizes = _whole(group, "media/size_bytes")
        self._modified = _whole(group, "media/modified_nanoseconds")
        self._keys = _whole(group, "media/content_keys")
        self._video_infos = _array(group, "media/video_infos")
        self._video_info_bounds = _whole(group, "media/video_info_bounds")
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._media_path = lru_cache(_PATHS_KEPT)(self._find_medium)

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
                self._media_path(medium)
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
        """Return what was probed of a video that was loaded lately; None for any other file."""
        medium = self._numbers.get(str(path))
        if medium is None:
            return None
        start, stop = self._video_info_bounds[medium : medium + 2]
        return VideoInfo.from_bytes(path, np.asarray(self._video_infos[start:stop]).tobytes())

    def _picture(self, row: list[float]) -> Picture:
        medium, frame, down, across = map(int, row[:4])
        is_video = bool(self._is_video[medium])
        path = self._media_path(medium)
        if is_video:
            self._numbers[path] = medium
            self._numbers.move_to_end(path)
            if len(self._numbers) > _PATHS_KEPT:
                self._numbers.popitem(last=False)
        return Picture(
            medium=Medium(path, "video" if is_video else "image"),
            frame=frame,
            patch_grid=(down, across),
            seconds=None if np.isnan(row[5]) else row[5],
        )

    def _find_medium(self, medium: int) -> str:
        """Return the path of a media file after checking that it has not changed."""
        start, stop = self._name_bounds[medium : medium + 2]
        path = resolve_media(self._names[start:stop].tobytes().decode(), self._base)
        status = path.stat()
        known = int(self._sizes[medium]), int(self._modified[medium])
        if (status.st_size, status.st_mtime_ns) != known:
            self._check_content(medium, path)
        return str(path)

    def _check_content(self, medium: int, path: Path) -> None:
        """Check a file that was copied or changed; only this reads its key from the store."""
        identity = FileIdentity(
            size_bytes=int(self._sizes[medium]),
            modified_nanoseconds=int(self._modified[medium]),
            content_key=self._keys[medium].tobytes(),
        )
        if not identity.matches(path):
            raise UserError(
                f"{path}: has changed since {self.path} was made, expected {identity.size_bytes} "
                "bytes of the same content; restore the file, or prepare the samples again"
            )


def _open(path: Path) -> tuple[zarr.Group, dict[str, Any]]:
    """Open a finished store; refuse anything else."""
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.samples: {path} is a folder but no store, expected one made by "
            "megatron-keye prepare; a folder that ends in .partial is continued by the same "
            "command"
        ) from error
    attributes = dict(group.attrs)
    if attributes.get("format") != FORMAT:
        raise UserError(
            f"data.samples: {path} has the format {attributes.get('format')!r}, expected "
            f"{FORMAT!r}; prepare the samples again"
        )
    return group, attributes


def _array(group: zarr.Group, name: str) -> Any:
    # Typed as Any, since zarr's own type of what an index returns admits scalars everywhere.
    return group[name]


def _whole(group: zarr.Group, name: str) -> NDArray[Any]:
    return np.asarray(_array(group, name)[:])


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
