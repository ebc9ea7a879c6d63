# SPDX-License-Identifier: Apache-2.0
"""Remote media are downloaded once per node, kept within bounds, and never another file."""

import errno
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.config import RemoteConfig
from megatron_keye.data.media import Medium, identify
from megatron_keye.data.remote import server
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.data.remote.server import ListenerError
from megatron_keye.errors import UserError
from tests.support.shelf import Shelf, num_transfers

GIBIBYTE = 2**30


@pytest.fixture
def config(tmp_path: Path) -> RemoteConfig:
    return RemoteConfig(cache_folder=str(tmp_path / "cache"), num_retries=2)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Make retries immediate; return what they would have waited for at most."""
    longest: list[float] = []

    class Dice:
        def uniform(self, low: float, high: float) -> float:
            longest.append(high)
            return 0.0

    monkeypatch.setattr(server.random, "SystemRandom", Dice)
    monkeypatch.setattr(Shelf, "faults", [])
    monkeypatch.setattr(Shelf, "seconds_per_block", 0.0)
    yield longest


def shelved(folder: Path, name: str, size: int = 1000) -> tuple[Path, Medium]:
    """Write a file and return its path and its medium, a URL."""
    path = folder / name
    path.write_bytes(np.random.default_rng(len(name)).bytes(size))
    return path, Medium(f"shelf://{path}", "video")


def content(medium: Medium, config: RemoteConfig) -> bytes:
    with local_copy(medium, config) as path:
        return path.read_bytes()


def read_in_a_process(url: str, config: RemoteConfig) -> bytes:
    Shelf.seconds_per_block = 0.1
    return content(Medium(url, "video"), config)


def test_a_node_downloads_a_file_once(tmp_path: Path, config: RemoteConfig) -> None:
    path, medium = shelved(tmp_path, "a b.mp4", size=20_000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        read = pool.starmap(read_in_a_process, [(medium.path, config)] * 6)
    assert read == [path.read_bytes()] * 6
    assert num_transfers(path) == 1
    with local_copy(medium, config) as copy:
        assert copy.suffix == ".mp4" and copy.read_bytes() == path.read_bytes()


def test_a_local_file_is_its_own_copy(tmp_path: Path) -> None:
    with local_copy(Medium(str(tmp_path / "v.mp4"), "video"), RemoteConfig()) as copy:
        assert copy == tmp_path / "v.mp4"


def test_requests_are_repeated_with_growing_random_waits(
    tmp_path: Path, config: RemoteConfig, waits: list[float]
) -> None:
    path, medium = shelved(tmp_path, "a.mp4")

    def broken(whole: bytes) -> bytes:
        raise ConnectionResetError("reset by peer")

    Shelf.faults = [broken, lambda whole: whole[:500]]
    assert content(medium, config) == path.read_bytes()
    assert waits == [1.0, 2.0]
    Shelf.faults = [broken] * 3
    with pytest.raises(RuntimeError, match="3 requests failed, the last with Conn.*num_retries"):
        content(replace(medium, path=f"shelf://{shelved(tmp_path, 'other.mp4')[0]}"), config)


def test_a_file_that_changes_while_it_is_copied_is_copied_again(
    tmp_path: Path, config: RemoteConfig
) -> None:
    path, medium = shelved(tmp_path, "a.mp4")

    def changing(whole: bytes) -> bytes:
        path.write_bytes(whole[::-1])
        return whole

    whole = path.read_bytes()
    Shelf.faults = [changing]
    assert content(medium, config) == whole[::-1]


def test_what_asking_again_cannot_change_is_refused_at_once(
    tmp_path: Path, config: RemoteConfig, waits: list[float]
) -> None:
    _, medium = shelved(tmp_path, "a.mp4")

    class RefusedError(Exception):
        status = 403

    def forbidden(whole: bytes) -> bytes:
        raise RefusedError("no entry")

    def full(whole: bytes) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    Shelf.faults = [forbidden, full]
    with pytest.raises(UserError, match=f"^{medium.path}: may not be read .no entry., expected"):
        content(medium, config)
    with pytest.raises(OSError, match="No space left"):
        content(medium, config)
    for url, words in {
        f"shelf://{tmp_path}/gone.mp4": "is not there",
        "absent://a.mp4": r"lacks a package for absent:// .Install absentfs.*pip install",
        "nosuch://a.mp4": "does not know nosuch://",
    }.items():
        with pytest.raises(UserError, match=f"^{url}: .*{words}"):
            content(Medium(url, "image"), config)
    with pytest.raises(UserError, match=f"^{medium.path}: is a URL.*data.remote.cache_folder"):
        content(medium, RemoteConfig())
    assert not waits


def test_the_least_recently_used_make_room_but_not_those_in_use(
    tmp_path: Path, config: RemoteConfig
) -> None:
    config = replace(config, cache_gibibytes=4000 / GIBIBYTE)
    names = [shelved(tmp_path, f"{name}.mp4") for name in "abcdef"]
    paths, media = zip(*names, strict=True)
    with local_copy(media[0], config) as held:
        for medium in media[1:4]:
            content(medium, config)
            time.sleep(0.01)
        content(media[1], config)  # Now the oldest that is not held is c.
        content(media[4], config)
        assert held.is_file()
    for medium in (media[0], media[1], media[4]):
        content(medium, config)
    assert [num_transfers(path) for path in paths] == [1, 1, 1, 1, 1, 0]
    content(media[2], config)
    assert num_transfers(paths[2]) == 2


def test_copies_never_outgrow_the_cache(tmp_path: Path, config: RemoteConfig) -> None:
    config = replace(config, cache_gibibytes=5000 / GIBIBYTE)
    sizes = np.random.default_rng(0).integers(1, 3000, 40)
    for number, size in enumerate(sizes.tolist()):
        _, medium = shelved(tmp_path, f"{number}.mp4", size)
        content(medium, config)
        copies = Path(config.cache_folder).rglob("copy-*")
        assert sum(copy.stat().st_size for copy in copies) <= 5000
    _, medium = shelved(tmp_path, "large.mp4", 5001)
    with pytest.raises(UserError, match="has 5,001 bytes, expected at most 5,000"):
        content(medium, config)
    with ExitStack() as held:
        for name in "abcde":
            held.enter_context(local_copy(shelved(tmp_path, name, 1000)[1], config))
        with pytest.raises(RuntimeError, match="5,000 bytes of it are being read"):
            content(shelved(tmp_path, "f", 1000)[1], config)


def test_a_copy_is_compared_with_the_server_from_time_to_time(
    tmp_path: Path, config: RemoteConfig
) -> None:
    path, medium = shelved(tmp_path, "a.mp4")
    old = content(medium, config)
    path.write_bytes(old[::-1])
    assert content(medium, config) == old
    later = replace(config, recheck_hours=1e-9)
    assert content(medium, later) == old[::-1]
    assert content(medium, later) == old[::-1]
    assert num_transfers(path) == 2, "a copy that is the server's was copied again"


def test_only_the_content_that_was_prepared_is_read(tmp_path: Path, config: RemoteConfig) -> None:
    path, medium = shelved(tmp_path, "a.mp4")
    old = content(medium, config)
    path.write_bytes(old[::-1])
    new = replace(medium, content_key=identify(path).content_key.hex())
    assert content(new, config) == old[::-1], "the server has what is wanted, the copy not"
    path.write_bytes(old + b"more")
    with pytest.raises(UserError, match=f"^{medium.path}: has changed since the samples were"):
        content(replace(new, content_key="00" * 16), config)


def test_what_a_killed_process_left_is_no_copy(tmp_path: Path, config: RemoteConfig) -> None:
    path, medium = shelved(tmp_path, "a.mp4")
    content(medium, config)
    (copy,) = Path(config.cache_folder).rglob("copy-*")
    copy.rename(copy.with_name("partial-5000"))
    assert content(medium, config) == path.read_bytes()
    assert not list(copy.parent.glob("partial-*"))


def test_a_damaged_copy_is_named_by_its_url(tmp_path: Path, config: RemoteConfig) -> None:
    _, medium = shelved(tmp_path, "a.mp4")
    with (
        pytest.raises(UserError, match=rf"^{medium.path}: /.*/copy-a\.mp4: is damaged"),
        local_copy(medium, config) as path,
    ):
        raise UserError(f"{path}: is damaged")


def test_a_slow_download_shows_that_it_lives(tmp_path: Path, config: RemoteConfig) -> None:
    path, medium = shelved(tmp_path, "a.mp4", size=40_000)
    Shelf.seconds_per_block = 0.1

    def watched(number: int) -> int:
        signs: list[float] = []
        time.sleep(0.2 * number)
        with local_copy(medium, config, on_bytes=lambda: signs.append(time.monotonic())):
            return len(signs)

    with ThreadPoolExecutor(2) as pool:
        downloader, waiter = pool.map(watched, range(2))
    assert downloader >= 10 and waiter >= 3
    assert num_transfers(path) == 1


def test_a_download_that_nobody_wants_any_more_ends(tmp_path: Path, config: RemoteConfig) -> None:
    path, medium = shelved(tmp_path, "a.mp4")

    def closed() -> None:
        raise RuntimeError("the decode service was closed")

    with (
        pytest.raises(ListenerError, match="was closed"),
        local_copy(medium, config, on_bytes=closed),
    ):
        pass
    assert num_transfers(path) == 1
    assert content(medium, config) == path.read_bytes()
