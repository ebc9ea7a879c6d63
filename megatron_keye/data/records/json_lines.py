# SPDX-License-Identifier: Apache-2.0
"""A sample file with one JSON object per line; empty lines are skipped."""

import hashlib
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from megatron_keye.data.records.block import RecordBlock

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """The lines of a file that are not empty, 16 bytes of memory for each.

    Args:
        stream: The file, which stays open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._starts, self._numbers = array("q"), array("q")
        digest = hashlib.blake2b(digest_size=16)
        start = 0
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            digest.update(line)
            if _text(line, number):
                self._starts.append(start)
                self._numbers.append(number)
            start += len(line)
        self._size = start
        self.digest = digest.hexdigest()
        """Digest of the file's content."""

    def __len__(self) -> int:
        """Return the number of lines that are not empty."""
        return len(self._starts)

    def number(self, index: int) -> int:
        """Return the number of the line, from 1."""
        return self._numbers[index]

    def read(self, index: int) -> bytes:
        """Return the line."""
        self._stream.seek(self._starts[index])
        return _text(self._stream.readline(), self._numbers[index])

    def block(self, start: int, stop: int) -> RecordBlock:
        """Return where the records from `start` to `stop` - 1 are."""
        end = self._starts[stop] if stop < len(self) else self._size
        offset = self._starts[start]
        return RecordBlock(
            offset=offset,
            size=end - offset,
            first=self._numbers[start],
            num_samples=stop - start,
        )


def read_lines(stream: BinaryIO, block: RecordBlock) -> Iterator[tuple[int, bytes]]:
    """Return the lines of a block with their numbers."""
    stream.seek(block.offset)
    for number, line in enumerate(stream.read(block.size).split(b"\n"), start=block.first):
        if text := _text(line, number):
            yield number, text


def _text(line: bytes, number: int) -> bytes:
    return (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
