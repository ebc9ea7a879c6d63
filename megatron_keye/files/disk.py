# SPDX-License-Identifier: Apache-2.0
"""The border to the disk: what it refuses becomes one sentence, with the path and what to do.

A disk that is full, read-only or gone is no programming error, and its user can mend it.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_keye.errors import UserError

_NEARLY_FULL_BYTES = 16 * 2**20
_OTHER_FOLDER = "choose another folder"
_REASONS = {
    errno.ENOSPC: ("no space left on the device", "free space there"),
    errno.EDQUOT: ("no space left of the quota", "free space there, or have the quota raised"),
    errno.EFBIG: ("a file larger than allowed", "raise the limit of file sizes (ulimit -f)"),
    errno.EROFS: ("a read-only file system", f"{_OTHER_FOLDER}, or have it mounted writable"),
    errno.EACCES: ("no permission to write", f"{_OTHER_FOLDER}, or have its permissions changed"),
    errno.EPERM: ("no permission to write", f"{_OTHER_FOLDER}, or have its permissions changed"),
    errno.ENOENT: ("no such folder any more", "put back what was moved or removed"),
    errno.ENOTDIR: ("a file in place of a folder", _OTHER_FOLDER),
    errno.ESTALE: ("a folder that its server has lost", "have the file system mounted anew"),
    errno.EIO: ("an input or output error of the device", f"{_OTHER_FOLDER} on a sound device"),
}
"""What a disk says, by its number, and what to do."""
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Those that say without a file's name that something could not be written."""
_NUMBER = re.compile(r"\[Errno (\d+)\]")
_WITHOUT_REASON = ("inline_container", "CheckpointException")
"""In errors of torch.save, and of what another process wrote, which hide the disk's own."""


class DiskError(UserError):
    """The disk refused to be written; nothing half-written should stay and keep it full."""


@contextmanager
def writing(path: Path, what: str, *, then: str = "") -> Iterator[None]:
    """Turn what the disk refuses in the `with` block into a DiskError.

    Libraries wrap its errors in their own; the reason is looked for in those that led to them.

    Args:
        path: The folder or file that is written; what is read elsewhere is none of its errors.
        what: What is written, to follow "expected room for ".
        then: What to do after that, to end the sentence.

    Raises:
        DiskError: For an error of the disk. Any other passes as it is.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        number, place = _disk_error(error, path)
        if number is None:
            raise
        raise DiskError(_sentence(number, place, what, then)) from error


@contextmanager
def making(path: Path, what: str, *, then: str = "") -> Iterator[None]:
    """Do as `writing` does, and remove what was begun, so that it does not keep the disk full.

    Args:
        path: The folder or file under its temporary name.
        what: What is written, to follow "expected room for ".
        then: What to do after that, to end the sentence.

    Raises:
        DiskError: As `writing`.
    """
    try:
        with writing(path, what, then=then):
            yield
    except DiskError:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder as far as the disk allows."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def check_writable(folder: Path, what: str, *, needed_bytes: int = 0) -> None:
    """Check before long work that a folder can be written and has room.

    Args:
        folder: The folder; where it does not exist, the nearest one above it is asked.
        what: What will be written, to follow "expected room for ".
        needed_bytes: How much it takes.

    Raises:
        DiskError: With what was got and what is needed.
    """
    whole = folder.absolute()
    try:
        existing = next(each for each in (whole, *whole.parents) if each.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise DiskError(_sentence(error.errno, folder, what, "")) from error
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskError(
            f"{folder}: got {gibibytes(free)} of free space, expected {gibibytes(needed_bytes)} "
            f"for {what}; free space there, or {_OTHER_FOLDER}"
        )


def gibibytes(num_bytes: int) -> str:
    """Return an amount in GiB with three digits."""
    amount = num_bytes / 2**30
    return f"{amount:,.0f} GiB" if amount >= 100 else f"{amount:.3g} GiB"


def _sentence(number: int, place: Path, what: str, then: str) -> str:
    reason, remedy = _REASONS[number]
    if number in (errno.ENOSPC, errno.EDQUOT) and (free := _free_bytes(place)) is not None:
        reason += f" ({gibibytes(free)} free)"
    return f"{place}: got {reason}, expected room for {what}; {remedy}{then}"


def _disk_error(error: BaseException, path: Path) -> tuple[int | None, Path]:
    """Return the number of the disk's error among those that led to one, and where it arose."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _REASONS:
            place = _place(cause)
            if _is_of(cause, place, path):
                return cause.errno, place or path
    texts = [str(cause) for cause in causes if not isinstance(cause, OSError)]
    for text in texts:  # An error of another process arrives as text.
        known = _REASONS if str(path) in text else _OF_WRITING
        if numbers := [int(each) for each in _NUMBER.findall(text) if int(each) in known]:
            return numbers[0], path
    if any(hint in text for text in texts for hint in _WITHOUT_REASON):
        return _ask(path), path
    return None, path


def _ask(path: Path) -> int | None:
    """Return what the disk says when something is written beside a path; None if it takes it."""
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent) as file:
            file.write(bytes(_NEARLY_FULL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in _REASONS else None
    return None


def _is_of(error: OSError, place: Path | None, path: Path) -> bool:
    """Return whether an error is about what is written at a path."""
    if place is not None:
        partial = path.with_name(f"{path.name}.partial")
        resolved = place.absolute()
        return any(resolved.is_relative_to(each.absolute()) for each in (path, partial))
    # Without a file, shared memory may be meant, which is full more often than disks are.
    return error.errno in _OF_WRITING and (error.errno != errno.ENOSPC or _is_full(path))


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the first one last."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def _place(error: OSError) -> Path | None:
    """Return the file that an error is about, if it names one."""
    name = error.filename
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None


def _is_full(path: Path) -> bool:
    free = _free_bytes(path)
    return free is None or free < _NEARLY_FULL_BYTES


def _free_bytes(path: Path) -> int | None:
    """Return the free space where a path is, None if it cannot be asked."""
    for each in (path.absolute(), *path.absolute().parents):
        try:
            return shutil.disk_usage(each).free
        except OSError:
            continue
    return None
