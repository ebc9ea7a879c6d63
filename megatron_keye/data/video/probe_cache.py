# SPDX-License-Identifier: Apache-2.0
"""Keeps what `probe` found, in a folder that processes share, so that a video is read once.

One process probes a file and the others wait for its answer: a lock that the kernel lets go of
when its process ends can't leave them waiting for ever.
"""

import hashlib
import logging
import os
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import av

from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import iterate_frames
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError
from megatron_keye.files.lock import locked
from megatron_keye.files.temporary import shared_folder

FORMAT = "megatron_keye.videos.1"
_KEPT = 32
"""Files whose answer stays in memory; that of two hours takes about 5 MB."""
_NUM_PARTS = 256
NODE_BYTES = 2**30
"""Most that is kept on a node for all runs of a user; a video of two hours takes about 1 MB."""

_logger = logging.getLogger(__name__)


class ProbeCache:
    """Answers of `probe` in a folder, a file for each video; can be pickled.

    Args:
        folder: Where they are kept; made when needed.
        max_bytes: What the folder may take; those that were made first go first. None: no limit.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def probe(self, path: Path) -> VideoInfo:
        """Return what `probe` returns, with its errors; also for a file whose start won't decode.

        Errors are not kept, since a file system may have recovered when it is asked again.
        """
        if not path.is_file():
            return probe(path)
        status = path.stat()
        return _cached(self._folder, self._max_bytes, path, status.st_size, status.st_mtime_ns)


def node_cache() -> ProbeCache:
    """Return the cache that all processes of this user share on this machine.

    Raises:
        UserError: When its folder, in that for temporary files, belongs to someone else.
    """
    return ProbeCache(shared_folder() / FORMAT, NODE_BYTES)


@lru_cache(maxsize=_KEPT)
def _cached(
    folder: Path, max_bytes: int | None, path: Path, size_bytes: int, modified_nanoseconds: int
) -> VideoInfo:
    """Read a kept answer, or probe and keep it."""
    # Versions of FFmpeg may divide a file into other packets.
    version = sorted(av.library_versions.items())
    state = f"{FORMAT}\n{version}\n{path}\n{size_bytes}\n{modified_nanoseconds}"
    key = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
    kept = folder / key[:2] / key
    if (info := _read(kept, path)) is not None:
        return info
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Without locks, processes that need a video at the same time all read it.
    with locked(kept.parent.with_suffix(".lock"), "exclusive", needs_lock=False):
        if (info := _read(kept, path)) is not None:
            return info
        info = probe(path)
        _check_start(info)
        try:
            _write(kept, info.to_bytes(), max_bytes)
        except OSError as error:
            _logger.warning("%s: is read again by each process, since %s", path, error)
    return info


def _check_start(info: VideoInfo) -> None:
    """Decode the first frame, so that no file is kept that is encrypted or lacks its headers."""
    with closing(
        iterate_frames(info.path, [0], num_threads=1, probe_video=lambda _: info)
    ) as frames:
        next(frames)


def _read(kept: Path, path: Path) -> VideoInfo | None:
    """Return a kept answer; None for none, or for a damaged one, as a power failure leaves."""
    try:
        return VideoInfo.from_bytes(path, kept.read_bytes())
    except (FileNotFoundError, UserError):
        return None


def _write(kept: Path, content: bytes, max_bytes: int | None) -> None:
    """Keep an answer, and let go of older ones beside it that exceed their part of the limit."""
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(kept)
    if max_bytes is None:
        return
    answers = [(entry.stat(), entry.path) for entry in os.scandir(kept.parent)]
    total = 0
    for status, name in sorted(answers, key=lambda answer: -answer[0].st_mtime_ns):
        total += status.st_size
        if total > max_bytes // _NUM_PARTS and name != str(kept):
            Path(name).unlink(missing_ok=True)
