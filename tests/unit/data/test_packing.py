# SPDX-License-Identifier: Apache-2.0
"""Packing loses nothing, repeats nothing, never overfills a row, and a window reduces padding."""

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.data.packing import PackingWindow, WaitingSample

ROW = 40


class Stream:
    """Samples numbered as they are drawn, with repeating lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths, self._numbers = lengths, count()
        self.drawn: list[WaitingSample] = []

    def draw(self) -> WaitingSample:
        number = next(self._numbers)
        length = self._lengths[number % len(self._lengths)]
        self.drawn.append(WaitingSample(source=0, index=number, num_tokens=length))
        return self.drawn[-1]


def in_order(lengths: list[int], num_rows: int) -> list[list[int]]:
    """Fill rows with samples in order, each until the next one does not fit."""
    rows, number = [], 0
    for _ in range(num_rows):
        row: list[int] = []
        room = ROW
        while room and lengths[number % len(lengths)] <= room:
            room -= lengths[number % len(lengths)]
            row.append(number)
            number += 1
        rows.append(row)
    return rows


lengths = st.lists(st.integers(1, ROW), min_size=1, max_size=30)


@given(lengths=lengths, num_rows=st.integers(0, 25))
def test_a_window_of_one_keeps_the_order(lengths: list[int], num_rows: int) -> None:
    window, stream = PackingWindow(1), Stream(lengths)
    rows = [window.fill_row(ROW, stream.draw) for _ in range(num_rows)]
    assert [[s.index for s in row] for row in rows] == in_order(lengths, num_rows)


@given(lengths=lengths, size=st.integers(1, 12), num_rows=st.integers(1, 25))
def test_rows_hold_what_was_drawn_once(lengths: list[int], size: int, num_rows: int) -> None:
    window, stream = PackingWindow(size), Stream(lengths)
    first_row: dict[int, int] = {}
    for number in range(num_rows):
        num_before = len(stream.drawn)
        row = window.fill_row(ROW, stream.draw)
        room = ROW - sum(sample.num_tokens for sample in row)
        assert row and room >= 0
        assert room == 0 or all(sample.num_tokens > room for sample in window.waiting), (
            "a waiting sample would have fitted"
        )
        assert len(window.waiting) <= size
        first_row |= {sample.index: number for sample in stream.drawn[num_before:]}
        waited = [number - first_row[sample.index] for sample in [*row, *window.waiting]]
        assert max(waited) <= size, "a sample waits too long"
        stream.drawn = [sample for sample in stream.drawn if sample not in row]
        assert stream.drawn == window.waiting, "lost, repeated or out of order"


@given(
    lengths=lengths, size=st.integers(1, 12), before=st.integers(0, 12), after=st.integers(1, 8)
)
def test_a_window_resumes_from_waiting_samples(
    lengths: list[int], size: int, before: int, after: int
) -> None:
    window, stream = PackingWindow(size), Stream(lengths)
    for _ in range(before):
        window.fill_row(ROW, stream.draw)
    other, rest = PackingWindow(size, window.waiting), Stream(lengths)
    for _ in range(len(stream.drawn)):
        rest.draw()
    for _ in range(after):
        assert window.fill_row(ROW, stream.draw) == other.fill_row(ROW, rest.draw)


def test_the_longest_that_fits_is_taken_and_the_older_of_equals() -> None:
    window, stream = PackingWindow(6), Stream([20, 15, 19, 9, 12, 12, 30, 30, 30, 30])
    assert [sample.index for sample in window.fill_row(ROW, stream.draw)] == [0, 2]
    assert [sample.index for sample in window.fill_row(ROW, stream.draw)] == [1, 4, 5]


@pytest.mark.parametrize(("size", "most_padding"), [(1, 0.35), (16, 0.05), (256, 0.01)])
def test_wider_windows_pad_less(size: int, most_padding: float) -> None:
    drawn = np.random.default_rng(0).lognormal(6.5, 1.0, 20_000).clip(16, 4096).astype(int)
    window, stream = PackingWindow(size), Stream(drawn.tolist())
    rows = [window.fill_row(4096, stream.draw) for _ in range(500)]
    used = sum(sample.num_tokens for row in rows for sample in row)
    assert 1 - used / (500 * 4096) < most_padding
