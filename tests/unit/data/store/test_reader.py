# SPDX-License-Identifier: Apache-2.0
"""Many samples of a store are read at once: all, in order, and few rows between them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.data.store import reader
from tools.benchmark_store import write_videos

CHUNK = 10


class CountingArray:
    """An array with zarr's interface that records the lengths read."""

    chunks = (CHUNK, 2)

    def __init__(self, length: int) -> None:
        self.values = np.arange(2 * length).reshape(length, 2)
        self.read: list[int] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.read.append(rows.stop - rows.start)
        return self.values[rows]


@pytest.mark.parametrize("seed", range(5))
def test_samples_come_in_the_order_asked_for(seed: int) -> None:
    generator = np.random.default_rng(seed)
    bounds = np.cumsum([0, *generator.integers(0, 40, 200)])
    array = CountingArray(int(bounds[-1]))
    indices = generator.integers(0, 200, 60).tolist()
    for index, part in zip(indices, reader._gather(array, bounds, indices), strict=True):
        np.testing.assert_array_equal(part, array.values[bounds[index] : bounds[index + 1]])
    assert reader._gather(array, bounds, []) == []


def test_only_neighbours_share_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_CHUNKS_PER_READ", 4)
    bounds = np.arange(0, 1001, 5)
    array = CountingArray(1000)
    reader._gather(array, bounds, [100, 3, 0, 101, 160])
    assert array.read == [20, 10, 5]
    array.read.clear()
    reader._gather(array, bounds, range(200))
    assert max(array.read) <= 4 * CHUNK and sum(array.read) == 1000


def test_an_open_store_of_ten_million_samples_would_hold_less_than_a_gibibyte(
    tmp_path: Path,
) -> None:
    num_samples = 50_000
    write_videos(tmp_path / "large.zarr", num_samples)
    tracemalloc.start()
    store = reader.SampleStore(tmp_path / "large.zarr", settings={})
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Less of it than here would be zarr's own.
    assert kept_bytes / num_samples * 10_000_000 < 2**30
    with pytest.raises(ValueError, match=f"line:50000.*videos/{num_samples - 1:050d}.mp4"):
        store.measure(num_samples - 1)
