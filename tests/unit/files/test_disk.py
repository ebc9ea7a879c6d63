# SPDX-License-Identifier: Apache-2.0
"""What a disk refuses is said in one sentence, and nothing half-written keeps it full."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_keye.errors import UserError
from megatron_keye.files.disk import DiskError, check_writable, making, writing
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.workers import Advance, make_files
from tests.support.small_disk import make_read_only, small_disk

MEBIBYTE = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 4) as folder:
        yield folder


REASONS = {
    errno.EDQUOT: "no space left of the quota",
    errno.EROFS: "a read-only file system",
    errno.EACCES: "no permission to write",
    errno.ENOENT: "no such folder any more",
    errno.EIO: "an input or output error of the device",
}


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.__getitem__)
def test_the_sentence_has_path_reason_and_remedy(number: int, tmp_path: Path) -> None:
    file = tmp_path / "run.partial" / "file"
    with (
        pytest.raises(DiskError) as refusal,
        writing(tmp_path / "run", "a checkpoint", then=", then go on"),
    ):
        raise OSError(number, os.strerror(number), str(file))
    assert str(refusal.value).startswith(f"{file}: got {REASONS[number]}")
    assert ", expected room for a checkpoint; " in str(refusal.value)
    assert str(refusal.value).endswith(", then go on")


def of_another_process() -> None:
    text = "in a worker: [Errno 122] Disk quota exceeded"
    raise CheckpointException("write", {1: (RuntimeError(text), None)})  # type: ignore[dict-item]


def led_to_another_error() -> None:
    try:
        raise OSError(errno.EFBIG, "File too large")
    except OSError:
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904


@pytest.mark.parametrize("fail", [of_another_process, led_to_another_error])
def test_the_reason_is_found_in_what_a_library_raises(
    fail: Callable[[], None], tmp_path: Path
) -> None:
    says = "no space left of the quota|a file larger"
    with pytest.raises(DiskError, match=says), writing(tmp_path, "a checkpoint"):
        fail()


OTHERS = {
    "a file that is read": FileNotFoundError(errno.ENOENT, "gone", "/data/video.mp4"),
    "shared memory": OSError(errno.ENOSPC, "No space left on device"),
    "a process": PermissionError(errno.EPERM, "not permitted"),
    "a socket": ConnectionResetError(errno.ECONNRESET, "reset"),
    "our own": UserError("a setting"),
    "a bug": KeyError("name"),
    "text of a reader": RuntimeError("[Errno 2] No such file: /data/video.mp4"),
}


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, writing(tmp_path, "a checkpoint"):
        raise error
    assert raised.value is error


def test_what_was_begun_on_a_full_disk_is_removed(disk: Path) -> None:
    begun = disk / "step.partial"
    says = r"step.partial: got no space left on the device"
    with pytest.raises(DiskError, match=says), making(begun, "a checkpoint"):
        begun.mkdir()
        with (begun / "weights").open("wb") as file:
            torch.save(torch.zeros(2 * MEBIBYTE), file)
    assert not list(disk.iterdir())


def test_room_and_permission_are_asked_before(disk: Path) -> None:
    check_writable(disk / "runs" / "first", "a checkpoint", needed_bytes=MEBIBYTE)
    with pytest.raises(DiskError, match=r"first: got 0.00391 GiB of free .*expected 1 GiB for 3 "):
        check_writable(disk / "runs" / "first", "3 checkpoints", needed_bytes=2**30)
    assert not list(disk.iterdir())
    (disk / "file").touch()
    with pytest.raises(DiskError, match=r"file/first: got a file in place of a folder"):
        check_writable(disk / "file" / "first", "a checkpoint")
    make_read_only(disk)
    with pytest.raises(DiskError, match=r"runs: got a read-only file system"):
        check_writable(disk / "runs", "a checkpoint")


class TwoMebibytes:
    """Makes files of two MiB, of which two exceed the disk."""

    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write the file."""
        for _ in range(2):
            stream.write(bytes(MEBIBYTE))
            stream.flush()
            advance(1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_folder_that_the_disk_does_not_take_is_removed(num_workers: int, disk: Path) -> None:
    folder = PartialFolder(disk / "made", "content")
    names = [f"file-{number}" for number in range(4)]
    says = r"made.partial: got no space left on the device"
    with pytest.raises(DiskError, match=says), folder.filling():
        make_files(TwoMebibytes(), names, folder, num_workers=num_workers, advance=lambda _: None)
    assert not list(disk.iterdir())


def test_a_read_only_disk_is_named_before_anything_is_made(disk: Path) -> None:
    make_read_only(disk)
    with pytest.raises(DiskError, match=r"made.partial.*: got a read-only file system"):
        PartialFolder(disk / "made", "content")
