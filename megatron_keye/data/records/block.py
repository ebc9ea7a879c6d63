# SPDX-License-Identifier: Apache-2.0
"""Neighbouring records of a sample file, as another process finds them again."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RecordBlock:
    """Neighbouring records."""

    offset: int
    """First byte; in parquet the first row."""
    size: int
    """Bytes; in parquet rows."""
    first: int
    """Number of the first record, from 1: of its line, or of its place in a list or parquet."""
    num_samples: int
    """Records."""
