# SPDX-License-Identifier: Apache-2.0
"""Copies over HTTP itself, from a server of the standard library, where aiohttp is installed."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megatron_keye.config import RemoteConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.errors import UserError

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and answers some paths with a status."""

    busy: ClassVar[list[int]] = []
    """Statuses of the next answers."""

    def send_head(self) -> Any:
        """Answer with a status that is due, or with the file."""
        status = self.busy.pop(0) if self.busy else 403 if "secret" in self.path else 200
        if status != 200:
            self.send_error(status)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "media").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "media"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_files_come_over_http(tmp_path: Path, server: str) -> None:
    config = RemoteConfig(cache_folder=str(tmp_path / "cache"), num_retries=2)
    (tmp_path / "media" / "a b.png").write_bytes(b"pixels" * 10_000)
    (tmp_path / "media" / "secret.png").touch()
    Handler.busy = [503, 429]
    with local_copy(Medium(f"{server}/a%20b.png?signature=1", "image"), config) as path:
        assert path.read_bytes() == b"pixels" * 10_000 and path.suffix == ".png"
    for name, words in {"gone.png": "is not there", "secret.png": "may not be read"}.items():
        with (
            pytest.raises(UserError, match=f"^{server}/{name}: {words}"),
            local_copy(Medium(f"{server}/{name}", "image"), config),
        ):
            pass
