# SPDX-License-Identifier: Apache-2.0
"""Times checkpoint conversion in both directions against a plain copy on the same disk.

    python tools/benchmark_conversion.py --gigabytes 8 [--folder DIR] [--workers N]

Prints JSON. A shared disk changes its speed within minutes, so each conversion is compared with
the mean of a copy before and one after it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.hf.parameter_shapes import count_parameters, parameter_shapes
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.cli.arguments import add_workers, make_parser
from megatron_keye.config import RunConfig
from megatron_keye.recipes import load_recipe

CONVERTER = (sys.executable, "-m", "megatron_keye", "convert")
GIGABYTE = 1_000_000_000
ONE_STAGE = "parallel.decoder.pipeline=1"  # which divides any number of layers
_POLL_SECONDS = 0.05


def main(arguments: list[str]) -> int:
    """Print the measurements and return the exit status."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as name:
        report = measure(Path(name), options.gigabytes, options.workers)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0 if report["is_bit_exact"] else 1


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("tools/benchmark_conversion.py", __doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="minimum size; default: 8")
    parser.add_argument("--folder", type=Path, help="where to write; default: TMPDIR, else /tmp")
    add_workers(parser)
    return parser.parse_args(arguments)


def measure(folder: Path, gigabytes: float, workers: int) -> dict[str, Any]:
    """Convert a synthetic checkpoint to native and back, with copies in between.

    Args:
        folder: Where to write; needs space for three checkpoints.
        gigabytes: Size of the checkpoint in 10^9 bytes, rounded up to whole layers.
        workers: Worker processes of a conversion.

    Returns:
        The JSON object to print.
    """
    run = sized_run(gigabytes)
    size = write_synthetic(folder / "hf", run.model)
    settings = [f"model.decoder.num_layers={run.model.decoder.num_layers}", ONE_STAGE]
    recipe = ["--recipe", run.name, *(part for each in settings for part in ("--set", each))]
    steps = {
        "hf_to_native": ["--hf", f"{folder}/hf", "--out", f"{folder}/native", *recipe],
        "native_to_hf": [
            *("--native", f"{folder}/native", "--out", f"{folder}/back"),
            # With the default, a checkpoint this small would be two files of unequal size.
            *("--shard-gigabytes", "1"),
        ],
    }
    report: dict[str, Any] = {"gigabytes": size / GIGABYTE, "workers": workers}
    copies = [_copy_seconds(folder / "hf")]
    peaks = []
    for step, parts in steps.items():
        command = [*CONVERTER, step.replace("_", "-"), *parts]
        seconds, peak = _watch([*command, "--workers", str(workers)])
        peaks.append(peak)
        copies.append(_copy_seconds(folder / "hf"))
        report[f"{step}_gigabytes_per_second"] = size / GIGABYTE / seconds
        report[f"{step}_share_of_copy"] = (copies[-2] + copies[-1]) / 2 / seconds
    report["copy_gigabytes_per_second"] = [size / GIGABYTE / seconds for seconds in copies]
    report["peak_gigabytes_of_one_process"] = max(peaks) / GIGABYTE
    report["is_bit_exact"] = _same_tensors(folder / "hf", folder / "back")
    return report


def sized_run(gigabytes: float) -> RunConfig:
    """Return the full-size recipe with just enough layers to reach the size in bf16."""
    run = load_recipe("keye_30b_a3b")(num_ranks=1, has_gpu=True)
    run = run.with_overrides([ONE_STAGE])
    for num_layers in range(1, run.model.decoder.num_layers + 1):
        decoder = replace(run.model.decoder, num_layers=num_layers)
        sized = replace(run, model=replace(run.model, decoder=decoder))
        num_bytes = 2 * sum(count_parameters(parameter_shapes(sized.model)).values())
        if num_bytes >= gigabytes * GIGABYTE:
            break
    return sized


def _watch(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and the peak resident bytes of any of its processes."""
    start, peak = time.perf_counter(), 0
    with psutil.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, *(_resident(each) for each in _family(process)))
            time.sleep(_POLL_SECONDS)
    if process.returncode:
        sys.exit(f"benchmark_conversion: {' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def _family(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _copy_seconds(source: Path) -> float:
    """Return the seconds of a copy on the same disk, fsync included."""
    target = source.with_name("copy")
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _same_tensors(one: Path, other: Path) -> bool:
    """Return whether both folders hold bit-equal tensors, however split into files."""
    mine, theirs = open_folder(one), open_folder(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(entry.read().view(torch.uint8), theirs[name].read().view(torch.uint8))
        for name, entry in mine.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
