# SPDX-License-Identifier: Apache-2.0
"""Times how long a store of many samples takes to open, and how much memory it holds then.

    python -m tools.benchmark_store --out docs/benchmarks/store.jsonl

Makes a store in which every sample has one token and a video of its own, and opens it twice in new
processes: the first reads it from wherever the machine has it, the second from its memory.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from megatron_keye.cli.arguments import make_parser
from megatron_keye.data.store.array import ARRAYS
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.writer import FORMAT, Appender
from tools.benchmark_lines import shared_fields, write_line


def main() -> None:
    """Make the store and measure it."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "many.zarr"
        write_videos(path, arguments.samples)
        for opening in ("first", "second"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, gibibytes = pool.apply(open_store, (path,))
            line = {
                "op": "open a store",
                "samples": arguments.samples,
                "opening": opening,
                "seconds": round(seconds, 2),
                "gibibytes": round(gibibytes, 3),
                "zarr": zarr.__version__,
                **shared_fields("tools.benchmark_store"),
            }
            write_line(line, arguments.out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_store", __doc__)
    parser.add_argument("--samples", type=int, default=10_000_000, help="default: 10 million")
    parser.add_argument("--folder", type=Path, help="where the store is made for a while")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args()


def open_store(path: Path) -> tuple[float, float]:
    """Return the seconds that opening takes, and the GiB that this process holds more after it."""
    memory = psutil.Process().memory_info
    before, started = memory().rss, time.perf_counter()
    store = SampleStore(path, settings={})
    seconds = time.perf_counter() - started
    held = memory().rss - before
    assert store.num_samples, "an open store has samples"
    return seconds, held / 2**30


def write_videos(path: Path, num_samples: int) -> None:
    """Write a store of samples that have one token and a video of their own each."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    arrays = {name: Appender(group, name) for name in ARRAYS}
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
    attributes: dict[str, Any] = {
        "settings": {},
        "sample_file": "line",
        "media_base": ".",
        "digest": "",
    }
    counts: dict[str, Any] = {"num_samples": num_samples, "num_media": num_samples, "unread": {}}
    group.attrs.put({"format": FORMAT, **counts, **attributes})


if __name__ == "__main__":
    main()
