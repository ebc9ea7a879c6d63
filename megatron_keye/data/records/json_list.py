# SPDX-License-Identifier: Apache-2.0
"""A sample file that is one JSON list. It is read whole once, to find where its items are."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_keye.data.records.block import RecordBlock
from megatron_keye.data.records.json_lines import BYTE_ORDER_MARK
from megatron_keye.errors import UserError

_BLANK = " \t\n\r"


class JsonList:
    """The items of a list, 16 bytes of memory for each once the file is indexed.

    Args:
        path: Name of the file, for error messages.
        stream: The file, which stays open.

    Raises:
        UserError: Naming the line at which the file is no JSON list.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._stream = stream
        self._starts, self._sizes = array("q"), array("q")
        stream.seek(0)
        content = stream.read()
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        """Digest of the file's content."""
        offset = len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0
        try:
            text = content[offset:].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 ({error}); convert the file") from error
        scanner = _Scanner(path, text)
        before = 0
        for start, end in scanner.items():
            # Offsets in the text count characters, those in the file bytes.
            offset += len(text[before:start].encode())
            size = len(text[start:end].encode())
            self._starts.append(offset)
            self._sizes.append(size)
            offset, before = offset + size, end

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._starts)

    def number(self, index: int) -> int:
        """Return the place of an item in the list, from 1."""
        return index + 1

    def read(self, index: int) -> bytes:
        """Return an item as it is written."""
        self._stream.seek(self._starts[index])
        return self._stream.read(self._sizes[index])

    def block(self, start: int, stop: int) -> RecordBlock:
        """Return where the items from `start` to `stop` - 1 are."""
        offset, last = self._starts[start], stop - 1
        return RecordBlock(
            offset=offset,
            size=self._starts[last] + self._sizes[last] - offset,
            first=start + 1,
            num_samples=stop - start,
        )


def read_items(path: Path, stream: BinaryIO, block: RecordBlock) -> Iterator[tuple[int, str]]:
    """Return the items of a block, as they are written, with their places."""
    stream.seek(block.offset)
    text = f"[{stream.read(block.size).decode()}]"
    for number, (start, end) in enumerate(_Scanner(path, text).items(), start=block.first):
        yield number, text[start:end]


def begins_list(stream: BinaryIO) -> bool:
    """Return whether the first character of a file opens a list."""
    stream.seek(0)
    while line := stream.readline():
        text = line.removeprefix(BYTE_ORDER_MARK).strip()
        if text:
            return text.startswith(b"[")
    return False


class _Scanner:
    """Finds the items of a list in a text."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def items(self) -> Iterator[tuple[int, int]]:
        """Yield where each item starts and ends."""
        decoder = json.JSONDecoder()
        position = self._skip(self._skip(0) + 1)
        while self._at(position) != "]":
            start = position
            try:
                position = decoder.raw_decode(self._text, start)[1]
            except RecursionError as error:
                raise self._error(start, "is nested too deeply") from error
            except json.JSONDecodeError as error:
                raise self._error(error.pos, f"is not valid JSON ({error.msg})") from error
            except ValueError as error:
                raise self._error(start, f"is not valid JSON ({error})") from error
            yield start, position
            position = self._skip(position)
            if self._at(position) == ",":
                position = self._skip(position + 1)
            elif self._at(position) != "]":
                raise self._error(position, "is not valid JSON (an item ends without a comma)")
        end = self._skip(position + 1)
        if end != len(self._text):
            raise self._error(end, "goes on after the end of the list")

    def _at(self, position: int) -> str:
        if position >= len(self._text):
            raise self._error(position, "ends before the list does")
        return self._text[position]

    def _skip(self, position: int) -> int:
        """Return the first position that is not blank."""
        while position < len(self._text) and self._text[position] in _BLANK:
            position += 1
        return position

    def _error(self, position: int, what: str) -> UserError:
        line = self._text.count("\n", 0, position) + 1
        return UserError(
            f"{self._path}:{line}: {what}, expected one list of conversations, or one "
            "conversation per line"
        )
