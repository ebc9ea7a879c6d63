"""Converts checkpoints between the released (Hugging Face) form and the native one.

    python tools/convert_checkpoint.py hf-to-native --hf DIR --out DIR --recipe keye_30b_a3b
    python tools/convert_checkpoint.py native-to-hf --native DIR --out DIR
    python tools/convert_checkpoint.py warm-start --qwen DIR --vision DIR --out DIR --recipe R
    python tools/convert_checkpoint.py bench --gigabytes 8

Killed half-way, the same command continues. Training begins from a native folder with
--set training.checkpoint.weights=DIR. Exit status 2 when an argument or a checkpoint is wrong;
nothing is left then.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where only a script's own folder is known

from launch.recipe import load_recipe, recipe_names  # noqa: E402
from megatron_keye.checkpoint import convert  # noqa: E402
from megatron_keye.checkpoint.synthetic import write_synthetic  # noqa: E402
from megatron_keye.checkpoint.warm_start import warm_start  # noqa: E402
from megatron_keye.config import RunConfig  # noqa: E402

USER_ERROR = 2
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIGABYTE = 1_000_000_000
ONE_STAGE = ["parallel.decoder.pipeline=1"]  # any number of layers divides by it


class Watched(AbstractContextManager["Watched"]):
    """A bar with gigabytes a second."""

    def __init__(self, what: str) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def begin(self, total_bytes: int) -> None:
        """Take the number of bytes that will be written."""
        self._bar.update(self._task, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Take the number of bytes written since the last call."""
        self._bar.advance(self._task, num_bytes)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    to_native = directions.add_parser("hf-to-native", help="released checkpoint to native")
    to_native.add_argument("--hf", type=Path, required=True, metavar="DIR")
    to_hf = directions.add_parser("native-to-hf", help="native checkpoint to released")
    to_hf.add_argument("--native", type=Path, required=True, metavar="DIR")
    to_hf.add_argument("--expert-layout", choices=("fused", "per-expert"), default="fused")
    to_hf.add_argument(
        "--files-from",
        type=Path,
        metavar="DIR",
        help="folder with tokenizer and processor files; default: those the checkpoint carries",
    )
    to_hf.add_argument(
        "--shard-gigabytes", type=float, default=5.0, help="most of one file; default 5"
    )
    warm = directions.add_parser("warm-start", help="native from Qwen3 and a vision encoder")
    warm.add_argument("--qwen", type=Path, required=True, metavar="DIR")
    warm.add_argument("--vision", type=Path, metavar="DIR", help="Keye-VL-1.5 or SigLIP folder")
    for parsed in (to_native, warm):
        _add_recipe(parsed)
    for parsed in (to_native, to_hf, warm):
        _add_common(parsed)
    bench = directions.add_parser("bench", help="measure both directions against a plain copy")
    bench.add_argument("--gigabytes", type=float, default=8.0)
    bench.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    bench.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(arguments)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", required=True, help=f"gives the sizes; one of: {names}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting of the recipe; may be given often",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--dtype", choices=TYPES, help="round to this type; default: keep")
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and Inf")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="pass over surplus tensors, for example 'visual.vision_model.head.*'",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; default: cores"
    )


def main(arguments: list[str]) -> int:
    """Convert, and return the exit code."""
    options = parse_arguments(arguments)
    try:
        if options.direction == "bench":
            return bench(options)
        with Watched(options.direction) as progress:
            run_conversion(options, progress)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    sys.stdout.write(f"{options.out}\n")
    return 0


def run_conversion(options: argparse.Namespace, progress: Watched) -> None:
    """Do what the command line says."""
    how = convert.Options(
        num_workers=options.workers,
        dtype=TYPES.get(options.dtype),
        checks_finite=options.check_finite,
        dropped=tuple(options.drop),
        progress=progress,
    )
    if options.direction == "native-to-hf":
        convert.native_to_hf(
            options.native,
            options.out,
            how,
            layout=options.expert_layout,
            file_bytes=int(options.shard_gigabytes * GIGABYTE),
            carried_from=options.files_from,
        )
        return
    run: RunConfig = load_recipe(options.recipe)(num_ranks=1, has_gpu=True)
    run = run.with_overrides(options.set)
    if options.direction == "hf-to-native":
        convert.hf_to_native(options.hf, options.out, run, how)
        return
    origins = warm_start(options.qwen, options.vision, options.out, run, how)
    for origin, count in sorted(Counter(origins.values()).items()):
        sys.stdout.write(f"{count:6d} tensors from {origin}\n")


def bench(options: argparse.Namespace) -> int:
    """Convert a synthetic checkpoint both ways and print JSON beside a plain copy's figures."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as name:
        folder = Path(name)
        run = _sized_run(options.gigabytes)
        size = write_synthetic(folder / "hf", run.model)
        tool = [sys.executable, __file__]
        same = ["--workers", str(options.workers)]
        layers = f"model.decoder.num_layers={run.model.decoder.num_layers}"
        recipe = ["--recipe", run.name, "--set", *ONE_STAGE, "--set", layers]
        out: dict[str, Any] = {"gigabytes": size / GIGABYTE, "workers": options.workers}
        # Before and after, because shared disks slow down once a burst is used up.
        out["copy_gigabytes_per_second_before"] = _copy_speed(folder / "hf", size)
        steps = {
            "hf_to_native": ["--hf", f"{folder}/hf", "--out", f"{folder}/native", *recipe],
            "native_to_hf": ["--native", f"{folder}/native", "--out", f"{folder}/back"],
        }
        for step, parts in steps.items():
            start = time.perf_counter()
            command = [*tool, step.replace("_", "-"), *parts, *same]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            out[f"{step}_gigabytes_per_second"] = size / GIGABYTE / seconds
        out["copy_gigabytes_per_second_after"] = _copy_speed(folder / "hf", size)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        out["peak_gigabytes_of_one_process"] = peak * 1024 / GIGABYTE
        out["is_bit_exact"] = _same_files(folder / "hf", folder / "back")
    sys.stdout.write(json.dumps(out, indent=2) + "\n")
    return 0


def _sized_run(gigabytes: float) -> RunConfig:
    """Return the full-size recipe with as many layers as make up the size."""
    from megatron_keye.checkpoint.parameter_shapes import count_parameters, parameter_shapes

    run: RunConfig = load_recipe("keye_30b_a3b")(num_ranks=1, has_gpu=True)
    run = run.with_overrides(ONE_STAGE)
    for num_layers in range(1, run.model.decoder.num_layers + 1):
        decoder = replace(run.model.decoder, num_layers=num_layers)
        sized = replace(run, model=replace(run.model, decoder=decoder))
        if 2 * sum(count_parameters(parameter_shapes(sized.model)).values()) >= gigabytes * 1e9:
            break
    return sized


def _copy_speed(source: Path, size: int) -> float:
    """Copy a folder on the same disk, down to the disk, and return gigabytes a second."""
    target = source.with_name("copy")
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return size / GIGABYTE / seconds


def _same_files(one: Path, other: Path) -> bool:
    """Return whether both folders hold the same tensors, however they are split into files."""
    from megatron_keye.checkpoint.safetensors_index import open_folder

    mine, theirs = open_folder(one), open_folder(other)
    if mine.keys() != theirs.keys():
        return False
    return all(
        torch.equal(entry.read().view(torch.uint8), theirs[name].read().view(torch.uint8))
        for name, entry in mine.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
