# SPDX-License-Identifier: Apache-2.0
"""A disk of a few MiB, where this machine lets a test mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount an empty file system on a new folder; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stderr
    except OSError as error:
        said = str(error)
    if said:
        pytest.skip(f"no disk of its own for this test: {said.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(disk: Path) -> None:
    """Let a disk of `small_disk` refuse to be written."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
