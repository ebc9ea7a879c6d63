"""Many samples of a store are read at once: all, in order, and few rows between them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr

from megatron_keye.data.store import reader, writer
from megatron_keye.data.store.array import ARRAYS

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


def write_videos(path: Path, num_samples: int) -> None:
    """Write a store of samples that have one token and a video of their own each."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    arrays = {name: writer._Appender(group, name) for name in ARRAYS}
    numbers, generator = np.arange(num_samples), np.random.default_rng(0)
    names = "".join(f"videos/{number:050d}.mp4" for number in numbers).encode()
    contents = {
        "tokens": np.zeros((num_samples, 2)),
        "samples/lines": numbers + 1,
        "samples/media": numbers,
        "pictures": np.zeros((num_samples, 6)),
        "media/names": np.frombuffer(names, dtype=np.uint8),
        "media/is_video": np.ones(num_samples, dtype=bool),
        "media/seconds": np.ones(num_samples),
        "media/size_bytes": generator.integers(0, 2**40, num_samples),
        "media/modified_nanoseconds": generator.integers(0, 2**60, num_samples),
        "media/content_keys": generator.integers(0, 256, (num_samples, 16)),
        "media/video_infos": np.zeros(num_samples),
    }
    for name, content in contents.items():
        arrays[name].append(content)
    for name in ARRAYS:
        if name.endswith("_bounds"):
            length = len(names) // num_samples if name == "media/name_bounds" else 1
            arrays[name].append_lengths([length] * num_samples)
        arrays[name].flush()
    attributes = {"settings": {}, "sample_file": "line", "media_base": ".", "digest": ""}
    counts = {"num_samples": num_samples, "num_media": num_samples, "unread": {}}
    group.attrs.put({"format": writer.FORMAT, **counts, **attributes})
