# SPDX-License-Identifier: Apache-2.0
"""A sample file in parquet; needs pyarrow, the extra `parquet`."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megatron_keye.data.records.block import RecordBlock
from megatron_keye.errors import UserError

_MAGIC = b"PAR1"
_BYTES_PER_READ = 1 << 20
_GROUPS_KEPT = 4
"""Row groups in memory; one is read whole for any of its rows."""


class Parquet:
    """The rows of a file.

    Args:
        path: Name of the file.
        stream: The file, which stays open.

    Raises:
        UserError: Without pyarrow, or for a file that it cannot read.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError(
                f"{path}: is parquet, which needs pyarrow; pip install 'megatron-keye[parquet]', "
                "or convert the file to JSON lines"
            ) from error
        stream.seek(0)
        digest = hashlib.blake2b(digest_size=16)
        while block := stream.read(_BYTES_PER_READ):
            digest.update(block)
        self.digest = digest.hexdigest()
        """Digest of the file's content."""
        try:
            self._file = ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({error})") from error
        metadata = self._file.metadata
        self._bounds = [0]
        for group in range(metadata.num_row_groups):
            self._bounds.append(self._bounds[-1] + metadata.row_group(group).num_rows)
        self._group = lru_cache(_GROUPS_KEPT)(self._file.read_row_group)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._bounds[-1]

    def number(self, index: int) -> int:
        """Return the place of a row, from 1."""
        return index + 1

    def read(self, index: int) -> dict[str, Any]:
        """Return a row by the names of its columns."""
        group = bisect_right(self._bounds, index) - 1
        (row,) = self._group(group).slice(index - self._bounds[group], 1).to_pylist()
        return dict(row)

    def block(self, start: int, stop: int) -> RecordBlock:
        """Return where the rows from `start` to `stop` - 1 are."""
        return RecordBlock(
            offset=start, size=stop - start, first=start + 1, num_samples=stop - start
        )


def read_rows(path: Path, block: RecordBlock) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the rows of a block with their places."""
    file = _opened(path, path.stat().st_mtime_ns)
    for index in range(block.offset, block.offset + block.size):
        yield file.number(index), file.read(index)


@lru_cache(maxsize=1)
def _opened(path: Path, modified_nanoseconds: int) -> Parquet:
    """Keep the file of the last block open: neighbouring blocks share a row group."""
    return Parquet(path, path.open("rb"))


def is_parquet(stream: BinaryIO) -> bool:
    """Return whether a file begins as parquet does."""
    stream.seek(0)
    return stream.read(len(_MAGIC)) == _MAGIC
