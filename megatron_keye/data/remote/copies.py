# SPDX-License-Identifier: Apache-2.0
"""Copies of remote media on this node: each is downloaded by one process and read by all.

A copy is a folder with the file and what was known of it when it came. Whoever reads it holds a
shared lock on the folder, whoever makes or removes it the exclusive one.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_keye.config import RemoteConfig
from megatron_keye.data.media import Medium, identify, is_remote
from megatron_keye.data.remote.room import LOCK, PARTIAL_PREFIX, STATE, CacheRoom
from megatron_keye.data.remote.server import RemoteFile
from megatron_keye.errors import UserError
from megatron_keye.files.lock import locked

NO_REMOTE = RemoteConfig()
"""Refuses URLs."""
_MOST_NAME_CHARACTERS = 100


@contextmanager
def local_copy(
    medium: Medium, config: RemoteConfig, *, on_bytes: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Hold a path of this machine under which a medium can be read.

    A local file is read where it is. A remote one is downloaded unless this node has a copy, which
    stays as it is within the `with` block, whatever becomes of it elsewhere.

    Args:
        medium: What to read; with a content key, only that content is accepted.
        config: Where copies are kept, and how much of them.
        on_bytes: Called each time that some bytes of a download have come, in this process or in
            the one that it waits for.

    Raises:
        UserError: Beginning with the URL: not there, other content, no room, URLs not enabled;
            also in front of what the `with` block says about the copy.
        RuntimeError: When the server fails after all retries, or all of the cache is in use.
        ListenerError: From what `on_bytes` raised.
    """
    if not is_remote(medium.path):
        yield Path(medium.path)
        return
    if not config.cache_folder:
        raise UserError(
            f"{medium.path}: is a URL, expected a path, as data.remote.cache_folder is not set; "
            "set it to a folder on a disk of this node, or download the file"
        )
    try:
        with _Copy(medium.path, config).held(medium.content_key, on_bytes) as path:
            yield path
    except UserError as error:
        raise UserError(f"{medium.path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _State:
    """What is known of a complete copy."""

    size_bytes: int
    version: str
    """As the server stated it."""
    content_key: str
    """As in `FileIdentity`, hexadecimal."""
    checked: float
    """When the server was asked last, in seconds since 1970."""


class _Copy:
    """The copy of one remote file."""

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self._config = config
        self._server = RemoteFile(url, config.num_retries)
        cache = Path(config.cache_folder).absolute()
        self._room = CacheRoom(cache, int(config.cache_gibibytes * 2**30))
        key = hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
        self._folder = cache / key[:2] / key
        # Ends as the URL does, since FFmpeg takes a hint from that.
        name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2], flags=re.ASCII)
        self._path = self._folder / f"copy-{name[-_MOST_NAME_CHARACTERS:]}"
        self._state_file = self._folder / STATE

    @contextmanager
    def held(self, content_key: str, on_bytes: Callable[[], None]) -> Iterator[Path]:
        """Hold a complete copy with this content, "" for any."""
        lock, while_waiting = self._folder / LOCK, self._growth_watch(on_bytes)
        while True:
            with locked(lock, "shared", while_waiting=while_waiting):
                state = self._current_state(content_key)
                if state is not None:
                    if content_key not in ("", state.content_key):
                        raise UserError(
                            "has changed since the samples were prepared, expected the same "
                            "content; restore the file, or prepare the samples again"
                        )
                    yield self._path
                    return
            with locked(lock, "exclusive", while_waiting=while_waiting):
                if self._current_state(content_key) is None:
                    self._download(on_bytes)

    def _current_state(self, content_key: str) -> _State | None:
        """Return the state of a copy that is the server's; None when it must be made.

        The server is asked from time to time, and about a copy of other content than is wanted.
        """
        state = self._state()
        if state is None:
            return None
        is_fresh = time.time() - state.checked < 3600 * self._config.recheck_hours
        if is_fresh and content_key in ("", state.content_key):
            # The time of last use, by which room is made.
            os.utime(self._state_file)
            return state
        now = self._server.state()
        if now.version != state.version or now.size_bytes not in (None, state.size_bytes):
            return None
        self._write(replace(state, checked=time.time()))
        return state

    def _state(self) -> _State | None:
        """Return the state of a complete copy."""
        with suppress(FileNotFoundError, ValueError, TypeError):
            state = _State(**json.loads(self._state_file.read_text()))
            if self._path.stat().st_size == state.size_bytes:
                return state
        return None

    def _download(self, on_bytes: Callable[[], None]) -> None:
        """Make the copy anew; the exclusive lock is held."""
        for path in list(self._folder.iterdir()):
            if path.name != LOCK:
                path.unlink()
        reserved = self._server.state().size_bytes or 0
        self._room.take(reserved)
        partial = self._folder / f"{PARTIAL_PREFIX}{reserved}"
        try:
            state = self._server.download(partial, on_bytes)
            size_bytes = partial.stat().st_size
            if size_bytes > reserved:
                self._room.take(size_bytes - reserved)
            content_key = identify(partial).content_key.hex()
        except BaseException:
            partial.unlink(missing_ok=True)
            self._room.give_back(reserved)
            raise
        partial.rename(self._path)
        self._write(
            _State(
                size_bytes=size_bytes,
                version=state.version,
                content_key=content_key,
                checked=time.time(),
            )
        )

    def _write(self, state: _State) -> None:
        temporary = self._folder / f"{STATE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(state)))
        temporary.rename(self._state_file)

    def _growth_watch(self, on_bytes: Callable[[], None]) -> Callable[[], None]:
        """Return a function that calls `on_bytes` when another process's download has grown."""
        seen = 0

        def look() -> None:
            nonlocal seen
            with suppress(FileNotFoundError):
                partials = self._folder.glob(f"{PARTIAL_PREFIX}*")
                size = sum(path.stat().st_size for path in partials)
                if size > seen:
                    seen = size
                    on_bytes()

        return look
