# SPDX-License-Identifier: Apache-2.0
"""A sample file in any form: records by number for training, blocks of them for preparation.

It is indexed once, in one pass, and not held in memory; a record is read when it is asked for.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_keye.data.records.block import RecordBlock
from megatron_keye.data.records.json_lines import JsonLines, read_lines
from megatron_keye.data.records.json_list import JsonList, begins_list, read_items
from megatron_keye.data.records.parquet import Parquet, is_parquet, read_rows
from megatron_keye.errors import UserError

RECORDS_PER_BLOCK = 64
"""Most work that a kill costs a worker. At 256K tokens each, a block takes 134 MB on disk."""


class RecordFile:
    """Records of a sample file by number.

    Args:
        path: JSON lines in UTF-8, one JSON list, or parquet.

    Raises:
        UserError: When it cannot be read, has no records, or is a malformed list or parquet; a
            malformed line shows when it is parsed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Kept open, so that a file that takes the name later is not read in its place.
            self._stream: BinaryIO = path.open("rb")
            self._identity = self._identify()
            self._records = _indexed(path, self._stream)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); correct the name"
            ) from error
        self.digest = self._records.digest
        """Digest of the content."""
        if not len(self._records):
            raise UserError(f"{path}: holds no samples, expected one conversation per line")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def name(self, index: int) -> str:
        """Return file and line of a record, or its place in a list or in parquet, from 1."""
        return f"{self.path}:{self._records.number(index)}"

    def read(self, index: int) -> Any:
        """Return a record, as `parse_conversation` takes it.

        Raises:
            UserError: If the file was written to since it was indexed.
        """
        if self._identify() != self._identity:
            raise UserError(
                f"{self.path}: was written to during the run, expected the samples that it began "
                "with; resume the run from its last checkpoint with the file as it was"
            )
        return self._records.read(index)

    def blocks(self, records_per_block: int) -> list[RecordBlock]:
        """Return all records in blocks of neighbours."""
        starts = range(0, len(self), records_per_block)
        ends = [min(start + records_per_block, len(self)) for start in starts]
        return [self._records.block(*bounds) for bounds in zip(starts, ends, strict=True)]

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns


def _indexed(path: Path, stream: BinaryIO) -> JsonLines | JsonList | Parquet:
    if is_parquet(stream):
        return Parquet(path, stream)
    return JsonList(path, stream) if begins_list(stream) else JsonLines(stream)


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A sample file, cut into blocks; can be pickled."""

    path: Path
    """The file."""
    digest: str
    """Digest of its content."""
    blocks: dict[str, RecordBlock]
    """Its blocks by name, in order."""

    @property
    def num_samples(self) -> int:
        """Records of all blocks."""
        return sum(block.num_samples for block in self.blocks.values())

    def read(self, name: str) -> Iterator[tuple[int, Any]]:
        """Return the records of a block with their numbers, as `parse_conversation` takes them."""
        block = self.blocks[name]
        with self.path.open("rb") as stream:
            if is_parquet(stream):
                yield from read_rows(self.path, block)
            elif begins_list(stream):
                yield from read_items(self.path, stream, block)
            else:
                yield from read_lines(stream, block)


def scan(path: Path, records_per_block: int = RECORDS_PER_BLOCK) -> SampleFile:
    """Cut a sample file into blocks, reading it once.

    Raises:
        UserError: As `RecordFile`.
    """
    file = RecordFile(path)
    blocks = {f"block-{n:08d}": b for n, b in enumerate(file.blocks(records_per_block))}
    return SampleFile(path=path, digest=file.digest, blocks=blocks)
