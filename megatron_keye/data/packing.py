# SPDX-License-Identifier: Apache-2.0
"""Packs samples end to end into rows of fixed length, chosen from a window of waiting samples.

A row starts with the sample that has waited longest, then takes the longest that still fits: best
fit keeps padding small, and no sample waits for more rows than the window has samples.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_keye.config.data import LossWeighting
from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Sample
from megatron_keye.data.weighting import loss_weights


@dataclass(frozen=True, kw_only=True)
class WaitingSample:
    """A sample that has been drawn but is in no row yet."""

    source: int
    """Number of the source it comes from."""
    index: int
    """Its index in that source."""
    num_tokens: int
    """Its length."""


class PackingWindow:
    """The samples that wait for a row."""

    def __init__(self, size: int, waiting: Iterable[WaitingSample] = ()) -> None:
        """Start with the samples that wait already.

        Args:
            size: Samples to choose from; 1 packs in the order of the stream.
            waiting: The samples that wait, in the order they were drawn.
        """
        self._size = size
        self._num_added = 0
        self._by_arrival: dict[int, WaitingSample] = {}
        # Negative arrival numbers put the oldest of equally long samples last, where bisect looks.
        self._by_length: list[tuple[int, int]] = []
        for sample in waiting:
            self.add(sample)

    @property
    def waiting(self) -> list[WaitingSample]:
        """The samples that wait, in the order they were drawn."""
        return list(self._by_arrival.values())

    def fill_row(
        self, row_tokens: int, draw: Callable[[], WaitingSample | None]
    ) -> list[WaitingSample]:
        """Choose the samples of one row by best fit.

        Args:
            row_tokens: Length of the row; no sample is longer.
            draw: Returns the next sample of the stream, None at its end.

        Returns:
            At least one sample, together at most `row_tokens` long, in the order of the row; none
            when the stream has ended and no sample waits.
        """
        taken: list[WaitingSample] = []
        room = row_tokens
        while room:
            while len(self._by_arrival) < self._size and (sample := draw()) is not None:
                self.add(sample)
            if not self._by_arrival:
                break
            position = self._longest_within(room) if taken else self._oldest()
            if position < 0:
                break
            _, negative_arrival = self._by_length.pop(position)
            taken.append(self._by_arrival.pop(-negative_arrival))
            room -= taken[-1].num_tokens
        assert room >= 0, f"samples are {-room} tokens longer than a row of {row_tokens}"
        return taken

    def add(self, sample: WaitingSample) -> None:
        """Let a sample wait behind those that wait already."""
        self._by_arrival[self._num_added] = sample
        insort(self._by_length, (sample.num_tokens, -self._num_added))
        self._num_added += 1

    def _longest_within(self, room: int) -> int:
        """Return the position of the longest sample of at most `room` tokens; -1 without one."""
        return bisect_right(self._by_length, (room, 0)) - 1

    def _oldest(self) -> int:
        arrival, sample = next(iter(self._by_arrival.items()))
        return bisect_right(self._by_length, (sample.num_tokens, -arrival)) - 1


def pack(
    samples: Sequence[Sample],
    row_tokens: int,
    *,
    pad_token_id: int,
    weighting: LossWeighting = "token",
) -> PackedRow:
    """Lay samples end to end and pad the rest of the row as a document of its own.

    Labels stay inside their document: a sample's last position has none.

    Args:
        samples: Samples that fit into one row together.
        row_tokens: Length of the row.
        pad_token_id: Token of the padding document.
        weighting: What a label weighs beside its sample's others (`data.loss_weighting`).

    Returns:
        A row with at least one document.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    num_real = sum(lengths)
    assert num_real <= row_tokens, f"{num_real} tokens were packed into a row of {row_tokens}"
    assert all(sample.labels[-1] == IGNORED_LABEL for sample in samples), (
        "a label crosses into the next document"
    )
    bounds = np.cumsum([0, *lengths], dtype=np.int64)
    token_ids = np.full(row_tokens, pad_token_id, dtype=np.int64)
    labels = np.full(row_tokens, IGNORED_LABEL, dtype=np.int64)
    weights = np.zeros(row_tokens, dtype=np.float32)
    picture_starts: list[int] = []
    for sample, start in zip(samples, bounds[:-1].tolist(), strict=True):
        stop = start + len(sample.token_ids)
        token_ids[start:stop] = sample.token_ids
        labels[start:stop] = sample.labels
        weights[start:stop] = loss_weights(sample.weights, weighting)
        picture_starts += [start + position for position in sample.picture_starts]
    if num_real < row_tokens:
        bounds = np.append(bounds, row_tokens)
    return PackedRow(
        token_ids=token_ids,
        labels=labels,
        weights=weights,
        document_bounds=bounds,
        num_real_tokens=num_real,
        pictures=tuple(picture for sample in samples for picture in sample.pictures),
        picture_starts=tuple(picture_starts),
        sample_names=tuple(sample.name for sample in samples),
    )
