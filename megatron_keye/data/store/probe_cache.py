"""What videos' containers said, kept on disk while a store is made.

A video is read from end to end to learn its times; with many samples on one video, several
processes and restarts, that should happen once.
"""

import hashlib
import os
import pickle
import zlib
from pathlib import Path

from megatron_keye.data.video.probe import VideoInfo, probe
from megatron_keye.errors import UserError


class ProbeCache:
    """Answers of `probe`, one small file each; pickles, and may be shared by processes."""

    def __init__(self, folder: Path) -> None:
        """Keep answers in `folder`, which need not be there."""
        self._folder = folder

    def probe(self, path: Path) -> VideoInfo:
        """Return what the container says; arguments and errors as those of `probe`.

        Two processes that meet a new file in the same moment both read it.
        """
        if not path.is_file():
            return probe(path)
        status = path.stat()
        state = f"{path}\n{status.st_size}\n{status.st_mtime_ns}"
        key = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
        kept = self._folder / key[:2] / key
        if kept.is_file():
            answer: VideoInfo | str = pickle.loads(zlib.decompress(kept.read_bytes()))
        else:
            answer = _answer(path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f"{key}.{os.getpid()}")
            temporary.write_bytes(zlib.compress(pickle.dumps(answer), level=1))
            temporary.replace(kept)
        if isinstance(answer, str):
            raise UserError(answer)
        return answer


def _answer(path: Path) -> VideoInfo | str:
    try:
        return probe(path)
    except UserError as error:
        return str(error)
