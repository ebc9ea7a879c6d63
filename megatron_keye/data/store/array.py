# SPDX-License-Identifier: Apache-2.0
"""An array of a store, read only as it was written: every file there, every number as it was.

zarr takes a missing file for zeros, and reads numbers by whatever type the metadata state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.errors import ChunkNotFoundError

from megatron_keye.data.reading import reading
from megatron_keye.errors import UserError

ARRAYS: Mapping[str, tuple[DTypeLike, tuple[int, ...]]] = {
    # Of each token: its id, and the bits of the float32 weight of its label, which is the next
    # token if the weight is above 0.
    "tokens": ("int32", (2,)),
    "samples/token_bounds": ("int64", ()),
    "samples/picture_bounds": ("int64", ()),
    "samples/media_bounds": ("int64", ()),
    "samples/lines": ("int64", ()),
    # The distinct media files that each sample uses, between its media_bounds.
    "samples/media": ("int32", ()),
    # Of each picture: medium, frame, patches down and across, first placeholder in its sample,
    # and its time in seconds. One array, since every array costs a read.
    "pictures": ("float64", (6,)),
    "media/name_bounds": ("int64", ()),
    "media/names": ("uint8", ()),
    "media/is_video": ("bool", ()),
    "media/seconds": ("float64", ()),
    "media/size_bytes": ("int64", ()),
    "media/modified_nanoseconds": ("int64", ()),
    "media/content_keys": ("uint8", (16,)),
    # What was probed of each video, empty for an image.
    "media/video_info_bounds": ("int64", ()),
    "media/video_infos": ("uint8", ()),
}
"""Type and row shape of each array by its name; bounds are [N + 1] and begin with 0."""
_KIND = "an array of prepared samples"
_REMEDY = "copy the store again, or prepare the samples again"


class StoredArray:
    """One array, read by slices of its rows.

    Args:
        store: Folder of the store.
        name: One of ARRAYS.
        num_rows: Rows that the rest of the store says it has.

    Raises:
        UserError: Naming the array's folder, when it is missing, damaged, of another type or of
            another length.
    """

    def __init__(self, store: Path, name: str, num_rows: int) -> None:
        self._folder = store / name
        with reading(self._folder, _KIND, _REMEDY):
            self._array = zarr.open_array(
                self._folder, mode="r", zarr_format=3, config={"read_missing_chunks": False}
            )
            got = np.dtype(self._array.dtype), self._array.shape[1:]
        expected = np.dtype(ARRAYS[name][0]), ARRAYS[name][1]
        if got != expected:
            raise UserError(
                f"{self._folder}: holds rows of {got[0]} {list(got[1])}, expected {expected[0]} "
                f"{list(expected[1])}; {_REMEDY}"
            )
        if len(self) != num_rows:
            raise UserError(
                f"{self._folder}: has {len(self):,} rows, expected {num_rows:,}; {_REMEDY}"
            )

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Return some rows; UserError naming a file that is missing, or the damaged array."""
        with reading(self._folder, _KIND, _REMEDY):
            try:
                return np.asarray(self._array[rows])
            except ChunkNotFoundError as error:
                raise UserError(
                    f"{self._missing_file()}: is not there, expected a part of an array; {_REMEDY}"
                ) from error

    @property
    def chunks(self) -> tuple[int, ...]:
        """Rows, then row shape, of what zarr reads at once."""
        return tuple(self._array.chunks)

    def _missing_file(self) -> Path:
        """Return the first file of the array that is not there."""
        rows_per_file = (self._array.shards or self._array.chunks)[0]
        rest = ["0"] * (len(self._array.shape) - 1)
        num_files = -(-len(self) // rows_per_file)
        paths = [self._folder.joinpath("c", str(n), *rest) for n in range(num_files)]
        return next((path for path in paths if not path.is_file()), self._folder)
