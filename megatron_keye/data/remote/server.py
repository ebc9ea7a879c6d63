# SPDX-License-Identifier: Apache-2.0
"""What fsspec says and gives of a remote file, asked again when a request fails by chance."""

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.data.reading import shortened
from megatron_keye.errors import UserError

_LONGEST_WAIT_SECONDS = 60.0
_SILENCE_SECONDS = 120.0
# What servers call the version of a file, the most exact first.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified"),
    *("last_modified", "updated", "mtime", "created"),
)
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_GONE_STATUSES = (404, 410)
# Of HTTP: the client waited too long, too many requests.
_PASSING_STATUSES = (408, 429)


class ListenerError(Exception):
    """What was told about bytes that have come raised an error, so nobody wants the rest."""


@dataclass(frozen=True)
class RemoteState:
    """What a server states about a file."""

    size_bytes: int | None
    """Its size; None where the server does not say."""
    version: str
    """ETag, checksum or time of its content; "" where the server does not say."""


class RemoteFile:
    """A file on a server.

    Its methods raise UserError, without the URL, for what asking again would not change: a file
    that is not there, a missing package. What still fails after all retries is a RuntimeError,
    since an outage is not the sample's fault and must not make a run skip it.

    Args:
        url: In any protocol of fsspec.
        num_retries: How often a failed request is repeated.
    """

    def __init__(self, url: str, num_retries: int) -> None:
        self._url, self._num_retries = url, num_retries

    def state(self) -> RemoteState:
        """Return what the server states now."""
        return self._repeat(self._state)

    def download(self, target: Path, on_bytes: Callable[[], None]) -> RemoteState:
        """Copy the whole file.

        Args:
            target: Local path, written over.
            on_bytes: Called each time that some bytes have come.

        Returns:
            The state before and after copying, which was the same.

        Raises:
            ListenerError: From what `on_bytes` raised; the request is not repeated.
        """
        return self._repeat(lambda: self._download(target, on_bytes))

    def _state(self) -> RemoteState:
        system, path = self._opened()
        system.invalidate_cache(path)
        stated = system.info(path)
        version = next((str(stated[name]) for name in _VERSIONS if stated.get(name)), "")
        return RemoteState(stated.get("size"), version)

    def _download(self, target: Path, on_bytes: Callable[[], None]) -> RemoteState:
        from fsspec.callbacks import Callback

        class Watched(Callback):
            def relative_update(self, inc: int = 1) -> None:
                try:
                    on_bytes()
                except Exception as error:
                    raise ListenerError(str(error)) from error

        system, path = self._opened()
        before = self._state()
        system.get_file(path, str(target), callback=Watched())
        size_bytes = target.stat().st_size
        if before.size_bytes not in (None, size_bytes):
            raise OSError(f"{size_bytes} bytes came, expected {before.size_bytes}")
        if (after := self._state()) != before:
            raise OSError(f"it changed from {before} to {after} while it was copied")
        return before

    def _opened(self) -> tuple[Any, str]:
        """Return fsspec's file system and its name of the file."""
        from fsspec.core import url_to_fs

        scheme = self._url.partition("://")[0]
        try:
            system, path = url_to_fs(self._url, **_options(scheme))
        except ImportError as error:
            raise UserError(
                f"fsspec lacks a package for {scheme}:// ({error}); pip install "
                "'megatron-keye[remote]' for http and https, s3fs for s3, gcsfs for gs"
            ) from error
        except ValueError as error:
            raise UserError(f"fsspec does not know {scheme}:// ({error}); correct it") from error
        return system, str(path)

    def _repeat[Result](self, request: Callable[[], Result]) -> Result:
        """Make a request until it succeeds; waits are random, so that ranks do not ask at once."""
        for attempt in range(self._num_retries + 1):
            try:
                return request()
            except (UserError, ListenerError):
                raise
            except Exception as error:
                failure = self._checked(error)
            if attempt < self._num_retries:
                longest = min(2.0**attempt, _LONGEST_WAIT_SECONDS)
                time.sleep(random.SystemRandom().uniform(0, longest))
        raise RuntimeError(
            f"{self._url}: {self._num_retries + 1} requests failed, the last with "
            f"{type(failure).__name__}: {shortened(str(failure))}; see if the server answers, "
            "or raise data.remote.num_retries"
        ) from failure

    def _checked(self, error: Exception) -> Exception:
        """Return what made a request fail; raise it if that will not pass."""
        if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
            raise error
        # Over HTTP, fsspec calls any failure of a request for the size "not found".
        is_unclear = self._url.startswith("http") and isinstance(error, FileNotFoundError)
        if is_unclear and isinstance(error.__cause__, Exception):
            error = error.__cause__
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(error, FileNotFoundError) or status in _GONE_STATUSES:
            raise UserError("is not there, expected a file; correct the URL") from error
        is_refused = status in range(400, 500) and status not in _PASSING_STATUSES
        if is_refused or isinstance(error, PermissionError):
            raise UserError(
                f"may not be read ({shortened(str(error))}), expected an open file; see the "
                "credentials"
            ) from error
        return error


def _options(scheme: str) -> dict[str, Any]:
    """Return options of fsspec without which long downloads fail."""
    if scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    # By default aiohttp ends any transfer after five minutes.
    timeout = ClientTimeout(total=None, sock_connect=30.0, sock_read=_SILENCE_SECONDS)
    own: dict[str, Any] = conf.get(scheme, {})
    return {"client_kwargs": {"timeout": timeout, **own.get("client_kwargs", {})}}
