# SPDX-License-Identifier: Apache-2.0
"""Times video decoding on one GPU, with DALI and with PyAV on all cores, in the same process.

    python -m tools.benchmark_decode --out results.jsonl

First it makes clips with a random access point every 30 frames: an animated film at bit rates of
the web, and moving texture at those of a camera. "decode" turns every frame into an upright RGB
tensor, from one file or several in parallel. "patches" samples 2 of 24 frames per second, as
training does, resizes and cuts them; its rate counts the skipped frames, too. NVIDIA's decoder
PyNvVideoCodec is timed with one stream if it is installed. Every case prints a line and appends a
JSON line; one that fails or times out is reported, and the next one runs. All cases take about
200 s on an H100 with 16 cores.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import torch
from torch import Tensor

from megatron_keye.cli.arguments import make_parser
from megatron_keye.config import VisionConfig
from megatron_keye.config.backends import DALI_NAMES, installed_version
from megatron_keye.data.media import Medium
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.frame_decoder import FrameDecoder, make_decoder
from megatron_keye.data.video.probe import probe
from tools.benchmark_clips import CONTENTS, ENCODERS, SIZES, Clip, make_clips
from tools.benchmark_lines import shared_fields

SLOW_SHARE = 4
"""Slow cases, with one stream or with PyAV, use a fourth of a clip; with a file per core an
eighth."""
FILES = 2
SAMPLED_EVERY = 12
FRAMES_PER_CHUNK = 8
PATCH_GRID = (24, 42)
PEER = "PyNvVideoCodec"
PEER_BATCH = 16


def main() -> None:
    """Make the clips and time every case."""
    arguments = parse_arguments()
    fields = describe()
    print(json.dumps(fields), flush=True)
    if not torch.cuda.is_available():
        print("no CUDA device: PyAV alone is timed", flush=True)
    has_dali = torch.cuda.is_available() and any(map(installed_version, DALI_NAMES))
    hung = 0
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder), arguments)
        for clip in clips:
            info = probe(clip.path)
            print(
                f"{clip.content} {clip.codec} {clip.size}: {info.num_frames} frames, "
                f"{clip.megabits()} Mbit/s, "
                f"{len(info.random_access_points)} random access points, "
                f"{info.gpu_unsupported_reason or 'fit for the GPU'}"
            )
        for clip in clips:
            for case in cases_of(clip, arguments.streams if has_dali else []):
                hung += not run_case(case, clip, fields, arguments)
        if hung:
            # Threads that hang would keep the process from exiting.
            sys.stdout.flush()
            os._exit(1)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_decode", __doc__)
    parser.add_argument("--contents", nargs="+", default=list(CONTENTS), choices=CONTENTS)
    parser.add_argument("--codecs", nargs="+", default=list(ENCODERS), choices=ENCODERS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--frames", type=int, default=1920, help="frames per clip; default: 1920")
    parser.add_argument("--seconds", type=float, default=1.0, help="minimum seconds per case")
    parser.add_argument("--timeout", type=float, default=40.0, help="maximum seconds per case")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args()


def describe() -> dict[str, Any]:
    """Return the fields that all lines share."""
    dali = next((version for name in DALI_NAMES if (version := installed_version(name))), None)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "dali": dali,
        "av": av.__version__,
        "pynvvideocodec": installed_version(PEER),
        **shared_fields("tools.benchmark_decode"),
    }


@dataclass(frozen=True)
class Case:
    """One measurement."""

    op: Literal["decode", "patches"]
    impl: Literal["dali", "pyav", "pynvvideocodec"]
    num_threads: int
    """Parallel segments of DALI, or threads of PyAV; 0 for one per core."""
    num_frames: int
    """Frames to decode of each file, from its beginning."""
    files: int = 1
    """Files that one decoder decodes in parallel."""


class PeerDecoder:
    """A `FrameDecoder` of PyNvVideoCodec with one stream, for frames from a file's beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._decoder: Any = None

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield frames as the other decoders do; the indices count from 0 without gaps."""
        import PyNvVideoCodec

        if self._decoder is None:
            self._decoder = PyNvVideoCodec.SimpleDecoder(
                str(path),
                gpu_id=self.device.index,
                output_color_type=PyNvVideoCodec.OutputColorType.RGB,
            )
        else:
            self._decoder.seek_to_index(0)
        for start in range(0, len(indices), PEER_BATCH):
            size = min(PEER_BATCH, len(indices) - start)
            # Cloned, since the next batch reuses the surfaces.
            for number, frame in enumerate(self._decoder.get_batch_frames(size)):
                yield start + number, torch.utils.dlpack.from_dlpack(frame).clone()

    def close(self) -> None:
        """Free the decoder."""
        self._decoder = None


def cases_of(clip: Clip, streams: list[int]) -> list[Case]:
    """Return the cases of a clip; PyAV runs with all cores on one file, and a file per core."""
    cores = len(os.sched_getaffinity(0))
    whole, part = clip.num_frames, clip.num_frames // SLOW_SHARE
    has_peer = bool(streams) and importlib.util.find_spec(PEER) is not None
    return [
        *([Case("decode", "pynvvideocodec", 1, part)] if has_peer else []),
        *(Case("decode", "dali", count, part if count == 1 else whole) for count in streams),
        *(Case("decode", "dali", count, whole, FILES) for count in streams[-1:]),
        Case("decode", "pyav", 0, part),
        Case("decode", "pyav", 1, part // 2, cores),
        *(Case("patches", "dali", count, whole) for count in streams[-1:]),
        Case("patches", "pyav", 0, part),
    ]


def one_pass(case: Case, clip: Clip, decoder: FrameDecoder) -> int:
    """Run a case once and return its number of frames, skipped ones included."""
    run = decode if case.op == "decode" else patches
    if case.files == 1:
        return run(decoder, clip, case.num_frames)
    with ThreadPoolExecutor(case.files) as pool:
        return sum(pool.map(lambda _: run(decoder, clip, case.num_frames), range(case.files)))


def decode(decoder: FrameDecoder, clip: Clip, num_frames: int) -> int:
    """Decode every frame and return their number."""
    count = sum(1 for _ in decoder.frames(clip.path, range(num_frames)))
    assert count == num_frames, f"got {count} of {num_frames} frames"
    return count


def patches(decoder: FrameDecoder, clip: Clip, num_frames: int) -> int:
    """Make patches of 2 frames per second, as training does; return `num_frames`."""
    pictures = [
        Picture(medium=Medium(str(clip.path), "video"), frame=frame, patch_grid=PATCH_GRID)
        for frame in range(0, num_frames, SAMPLED_EVERY)
    ]
    chunks = [
        pictures[start : start + FRAMES_PER_CHUNK]
        for start in range(0, len(pictures), FRAMES_PER_CHUNK)
    ]
    vision = VisionConfig(num_layers=1, hidden_size=16, intermediate_size=16, num_heads=2)
    with closing(decode_chunks(chunks, decoder, vision)) as decoded:
        for _ in decoded:
            pass
    return num_frames


def run_case(
    case: Case, clip: Clip, fields: dict[str, Any], arguments: argparse.Namespace
) -> bool:
    """Time a case in a thread, report the result and return whether the thread ended."""
    outcome: dict[str, Any] = {}
    thread = threading.Thread(
        target=measure, args=(case, clip, arguments.seconds, outcome), daemon=True
    )
    thread.start()
    thread.join(arguments.timeout)
    if thread.is_alive():
        outcome = {"error": f"still running after {arguments.timeout:g} s"}
    line = {
        "op": case.op,
        "impl": case.impl,
        "content": clip.content,
        "codec": clip.codec,
        "size": clip.size,
        "megabits_per_s": clip.megabits(),
        "streams": case.num_threads,
        "files": case.files,
        **outcome,
        **fields,
    }
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    figures = outcome.get("error") or (
        f"{outcome['frames_per_s']:8.0f} frames/s, {outcome['frames']} frames, GPU memory "
        f"{outcome['gpu_mebibytes']} MiB more"
    )
    parallel = f"{case.num_threads or 'all':>3} streams, {case.files:2} files"
    names = f"{case.op:8}{case.impl:15}{clip.content:8}{clip.codec} {clip.size:5}"
    print(f"{names} {parallel} {figures}")
    sys.stdout.flush()
    return not thread.is_alive()


def measure(case: Case, clip: Clip, seconds: float, outcome: dict[str, Any]) -> None:
    """Repeat a case for `seconds`, on a GPU after one warm-up, and fill `outcome`."""
    try:
        before = used_gpu_bytes()
        warm_up = time.perf_counter()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if case.impl == "pynvvideocodec":
            decoder: FrameDecoder = PeerDecoder(device)
        else:
            decoder = make_decoder(case.impl, device, case.num_threads)
        if case.impl != "pyav":
            one_pass(case, clip, decoder)
        started = time.perf_counter()
        frames = 0
        while time.perf_counter() - started < seconds:
            frames += one_pass(case, clip, decoder)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        outcome["frames_per_s"] = round(frames / elapsed, 1)
        outcome["frames"], outcome["seconds"] = frames, round(elapsed, 3)
        outcome["warm_up_s"] = round(started - warm_up, 3)
        outcome["gpu_mebibytes"] = (used_gpu_bytes() - before) >> 20
        decoder.close()
    except Exception as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"


def used_gpu_bytes() -> int:
    """Return the used memory of the GPU, all processes included."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    main()
