# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: every file with its size and checksum.

It is written last. A folder without it, or with a file that differs from it, is no whole
checkpoint. Without torch.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from megatron_keye.errors import UserError
from megatron_keye.files.written_file import FileSum, sum_file, sync, write_text

MANIFEST = "manifest.json"
_REMEDY = "copy the checkpoint again, or take another one"

Files = dict[str, FileSum]
"""Size and checksum of each file, by its path in the folder."""


def write_manifest(folder: Path, known: Mapping[str, FileSum]) -> None:
    """Complete the folder of a checkpoint, and wait until all of it is on the disk.

    Args:
        folder: The folder, to which nothing will be added.
        known: Sums of files that were synced; all others are read and synced here.
    """
    files: Files = {}
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            sync(path)
        if path.is_file():
            files[name] = known.get(name) or sum_file(path)
    entries = {name: asdict(each) for name, each in files.items()}
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=1))
    sync(folder)


def check_sizes(folder: Path) -> Files:
    """Return the files of a whole checkpoint, by its manifest, after a look at their sizes.

    Raises:
        UserError: Names the file that is missing, cut short or cannot be read.
    """
    files = _read(folder)
    for name, expected in files.items():
        path = folder / name
        try:
            got = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
        if got != expected.size_bytes:
            found = "no such file" if got is None else f"{got} bytes"
            raise UserError(
                f"{path}: got {found}, expected {expected.size_bytes} bytes as {MANIFEST} says; "
                f"{_REMEDY}"
            )
    return files


def check_sums(
    folder: Path, files: Files, names: Iterable[str] | None = None, *, num_threads: int = 1
) -> None:
    """Read files of a checkpoint and compare their checksums.

    Args:
        folder: The checkpoint.
        files: From `check_sizes`.
        names: Those to read; None for all.
        num_threads: Files to read at once.

    Raises:
        UserError: Names the file that differs or cannot be read.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(
            lambda name: _check_sum(folder / name, files[name]), files if names is None else names
        ):
            pass


def _check_sum(path: Path, expected: FileSum) -> None:
    try:
        got = sum_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if got != expected:
        raise UserError(
            f"{path}: got a checksum of {got.crc32:08x}, expected {expected.crc32:08x} as "
            f"{MANIFEST} says; its content is damaged, {_REMEDY}"
        )


def problem_of(folder: Path) -> str:
    """Return why a folder is no whole checkpoint, by the sizes of its files; "" if it is one."""
    try:
        check_sizes(folder)
    except UserError as error:
        return str(error)
    return ""


def _read(folder: Path) -> Files:
    """Return what the manifest says."""
    file = folder / MANIFEST
    try:
        entries = json.loads(file.read_text())["files"]
        return {
            name: FileSum(int(entry["size_bytes"]), int(entry["crc32"]))
            for name, entry in entries.items()
        }
    except (FileNotFoundError, NotADirectoryError) as error:
        got, remedy = _kind(folder)
        raise UserError(
            f"{folder}: got {got}, expected the folder of a complete native checkpoint "
            f"(.../checkpoints/step-NNNNNNNN, or what megatron-keye convert made); {remedy}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: cannot be read ({error!r}), expected sizes and checksums of the "
            f"checkpoint's files; {_REMEDY}"
        ) from error


def _kind(folder: Path) -> tuple[str, str]:
    """Return what lies where a checkpoint with a manifest was expected, and what to do."""
    if any(folder.glob("*.safetensors")):
        return "a Hugging Face folder", "make one of it with megatron-keye convert hf-to-native"
    of_run = sorted(folder.glob("checkpoints/step-????????"))
    if of_run:
        return "the folder of a run", f"take one of its checkpoints, such as {of_run[-1]}"
    if folder.is_dir():
        return f"no {MANIFEST}", _REMEDY
    return "a file" if folder.exists() else "no such folder", "check the path"
