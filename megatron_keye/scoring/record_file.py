# SPDX-License-Identifier: Apache-2.0
"""Objects of a file of questions or answers, in any form that sample files have."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.data.records.file import RecordFile
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One object of a file."""

    name: str
    """File and line, or place in a list, for error messages."""
    line: int
    """Number of the line or place, from 1."""
    value: dict[str, Any]
    """The object."""


def read_records(path: Path) -> Iterator[Record]:
    """Yield the objects of a file in order.

    Args:
        path: JSON lines, one JSON list, or parquet.

    Raises:
        UserError: Naming the file, or the line that is no JSON object.
    """
    file = RecordFile(path)
    for index in range(len(file)):
        name, raw = file.name(index), file.read(index)
        try:
            value = json.loads(raw) if isinstance(raw, (str, bytes)) else raw
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: is not valid JSON ({error}); one object per line") from error
        if not isinstance(value, dict):
            raise UserError(f"{name}: got {type(value).__name__}, expected an object")
        yield Record(name=name, line=int(name.rpartition(":")[2]), value=value)
