# SPDX-License-Identifier: Apache-2.0
"""The border to libraries that read files of a user: what they raise becomes a UserError.

Pillow, FFmpeg, zarr, json and the file system raise whatever their code runs into when a file is
damaged: MemoryError, IndexError, struct.error, AssertionError. A `with` block of this file holds
such calls alone, never code of this package, whose errors keep their traceback.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.errors import UserError

_MOST_CHARACTERS = 255
_END_CHARACTERS = 60
_END = object()


def shortened(text: str) -> str:
    """Return a name or a message in one line of at most some 255 characters.

    Of longer texts the beginning, the end and the length remain: samples have been seen that hold
    a whole image in place of its name.
    """
    line = text if text.isprintable() else " ".join(text.split())
    if len(line) <= _MOST_CHARACTERS:
        return line
    start = line[: _MOST_CHARACTERS - _END_CHARACTERS]
    return f"{start}...{line[-_END_CHARACTERS:]} ({len(line):,} characters)"


@contextmanager
def reading(
    file: Path | str, kind: str, remedy: str = "replace the file or drop the sample"
) -> Iterator[None]:
    """Turn what a library raises in the `with` block into a UserError that names the file.

    Args:
        file: Path or URL, which begins the sentence.
        kind: What the file should be, to follow "cannot be read as ".
        remedy: What to do, to end the sentence.

    Raises:
        UserError: For any exception but one that ends the process, such as KeyboardInterrupt. A
            UserError of the block passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file}: is not there, expected {kind}; correct the name") from error
    except Exception as error:
        raise UserError(
            f"{file}: cannot be read as {kind} ({_reason(error)}), expected it whole and "
            f"undamaged; {remedy}"
        ) from error


def read_each[Item](items: Iterable[Item], file: Path | str, kind: str) -> Iterator[Item]:
    """Yield what a library yields, such as packets or frames, with `reading` around each of them.

    What the caller does with an item stays outside of the border.

    Raises:
        UserError: As `reading`.
    """
    with reading(file, kind):
        iterator = iter(items)
    while True:
        with reading(file, kind):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


def _reason(error: Exception) -> str:
    """Return what an exception says; its class too where that is part of the meaning."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = shortened(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
