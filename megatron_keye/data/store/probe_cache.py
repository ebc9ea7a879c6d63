"""Caches probe results of videos on disk while a store is made.

A probe reads a video from end to end for its frame times. Samples, processes and restarts share
one result.
"""

import hashlib
import os
import pickle
import zlib
from pathlib import Path

from megatron_keye.data.video.probe import VideoInfo, probe
from megatron_keye.errors import UserError


class ProbeCache:
    """Results of `probe`, one small file each; can be pickled and shared by processes."""

    def __init__(self, folder: Path) -> None:
        """Cache results in `folder`, which is created when needed."""
        self._folder = folder

    def probe(self, path: Path) -> VideoInfo:
        """Return what `probe` returns, with its arguments and errors.

        Two processes that need a new file at the same time both read it.
        """
        if not path.is_file():
            return probe(path)
        status = path.stat()
        state = f"{path}\n{status.st_size}\n{status.st_mtime_ns}"
        key = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
        cached = self._folder / key[:2] / key
        if cached.is_file():
            result: VideoInfo | str = pickle.loads(zlib.decompress(cached.read_bytes()))
        else:
            result = _probe_or_error(path)
            cached.parent.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_name(f"{key}.{os.getpid()}")
            temporary.write_bytes(zlib.compress(pickle.dumps(result), level=1))
            temporary.replace(cached)
        if isinstance(result, str):
            raise UserError(result)
        return result


def _probe_or_error(path: Path) -> VideoInfo | str:
    try:
        return probe(path)
    except UserError as error:
        return str(error)
