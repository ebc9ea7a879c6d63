# SPDX-License-Identifier: Apache-2.0
"""Caches features of a frozen vision encoder on disk: zarr arrays, one zarr chunk per picture.

The name of an entry contains everything that decides the features: the content of the media file,
the frame, the patch grid and the weights. A change of any of them gives another name, so nothing
stale is ever read.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from megatron_keye.config import RemoteConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.reading import reading
from megatron_keye.data.remote.copies import NO_REMOTE, local_copy
from megatron_keye.data.row import Picture
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.files.disk import writing

FORMAT = "megatron_keye.features.1"
_READ_BYTES = 16 * 2**20


class FeatureCache:
    """Features of one set of weights.

    Any number of processes may read and write at once: each picture is a file of its own, written
    atomically, and two processes that write the same picture write the same features.

    Args:
        folder: Root of the cache, for features of any weights.
        maker: Folder name that identifies all that decides features besides the picture.
        width: Features per patch.
        dtype: Of the features.
        probe_video: Tells what a file holds.
        remote: Where copies of remote media are kept; by default such media are refused.
    """

    def __init__(
        self,
        folder: Path,
        maker: str,
        width: int,
        dtype: torch.dtype,
        *,
        probe_video: Callable[[Path], VideoInfo] = probe,
        remote: RemoteConfig = NO_REMOTE,
    ) -> None:
        self._folder = folder / FORMAT / maker
        self._probe_video, self._remote = probe_video, remote
        self._width, self._dtype = width, dtype
        # numpy has no bfloat16; its bits are stored as integers.
        self._stored = torch.uint16 if dtype == torch.bfloat16 else dtype

    def has(self, picture: Picture) -> bool:
        """Return whether a picture's features are cached.

        Raises:
            UserError: Naming the file, when it is missing.
        """
        return (self._array_folder(picture) / "c" / str(picture.frame) / "0" / "0").is_file()

    def read(self, picture: Picture) -> Tensor:
        """Return the features [P, W] of a cached picture, on the CPU.

        Raises:
            UserError: Naming the damaged array.
        """
        folder = self._array_folder(picture)
        kind = f"features of frame {picture.frame} of {picture.medium.path}"
        with reading(folder, kind, "remove the folder to encode them again"):
            # Format 2 knows pickles, whose reading runs code unless zarr is new enough to refuse.
            stored = np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[picture.frame])
        expected = (picture.num_patches, self._width)
        assert stored.shape == expected, f"{folder}: got {stored.shape}, expected {expected}"
        return torch.from_numpy(stored).view(self._dtype)

    def write(self, picture: Picture, features_PW: Tensor) -> None:
        """Store the features [P, W] of a picture.

        Raises:
            DiskError: When the disk does not take them.
        """
        folder = self._array_folder(picture)
        with writing(folder, "cached features"):
            if not (folder / "zarr.json").is_file():
                # Another process may have created the same array since.
                with suppress(ContainsArrayError):
                    self._create(folder, picture)
            stored = features_PW.detach().to("cpu", self._dtype).contiguous().view(self._stored)
            # By default zarr writes no chunk of zeros alone, and `has` looks for the chunk's file.
            array = zarr.open_array(
                folder, mode="r+", zarr_format=3, config={"write_empty_chunks": True}
            )
            array[picture.frame] = stored.numpy()

    def _create(self, folder: Path, picture: Picture) -> None:
        """Create the array for all frames of a file."""
        num_frames = 1
        if picture.medium.kind == "video":
            with local_copy(picture.medium, self._remote) as path:
                num_frames = self._probe_video(path).num_frames
        zarr.create_array(
            folder,
            zarr_format=3,
            shape=(num_frames, picture.num_patches, self._width),
            chunks=(1, picture.num_patches, self._width),
            dtype=str(self._stored).removeprefix("torch."),
            # Features do not compress; the checksum detects damage.
            compressors=[Crc32cCodec()],
            attributes={"dtype": str(self._dtype), "grid": list(picture.patch_grid)},
            overwrite=False,
        )

    def _array_folder(self, picture: Picture) -> Path:
        rows, columns = picture.patch_grid
        content = self._content(picture.medium)
        return self._folder / content[:2] / content / f"{picture.medium.kind}-{rows}x{columns}"

    def _content(self, medium: Medium) -> str:
        """Return a digest of a medium's content, if possible without a download."""
        if medium.content_key:
            key = f"{medium.path}\n{medium.content_key}".encode()
            return hashlib.blake2b(key, digest_size=16).hexdigest()
        with local_copy(medium, self._remote) as path:
            return content_digest(path)


def content_digest(path: Path) -> str:
    """Return a digest of a file's content, cached until its size or modification time changes.

    Raises:
        UserError: When the file cannot be read.
    """
    with reading(path, "a media file"):
        status = path.stat()
        return _content_digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _content_digest(path: Path, modified_nanoseconds: int, size_bytes: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
