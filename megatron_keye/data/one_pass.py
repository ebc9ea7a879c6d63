# SPDX-License-Identifier: Apache-2.0
"""The rows of one source from its first sample to its last, as often as they are asked for."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import PackedRow

_ROWS_PER_READ = 16
"""Rows that are read at once; 64 MB at 256K tokens."""


class OnePass:
    """Rows of a source in the order of its samples, always the same.

    Which samples are in which row is kept, so that memory grows with the number of samples.

    Args:
        path: Sample file or store.
        config: Row length, packing, tokenizer, budgets, what to do with bad samples.
        model: Vocabulary and picture sizes.
        num_rows: Most rows; 0 for all.

    Raises:
        UserError: As `RowLoader`, and for bad samples among the rows, unless they are skipped.
    """

    def __init__(self, path: str, config: DataConfig, model: ModelConfig, num_rows: int) -> None:
        alone = replace(config, samples=path, shuffles=False)
        self._loader = RowLoader(alone, model, seed=0, epochs=1.0)
        self._chosen = self._loader.choose_rows(num_rows or sys.maxsize)
        self.num_skipped = self._loader.num_skipped
        """Bad samples that were left out."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._chosen)

    def __iter__(self) -> Iterator[PackedRow]:
        """Yield the rows.

        Raises:
            UserError: For a sample that has become unusable.
        """
        for first in range(0, len(self._chosen), _ROWS_PER_READ):
            yield from self._loader.pack_rows(self._chosen[first : first + _ROWS_PER_READ])
