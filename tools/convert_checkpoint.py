"""Converts checkpoints between the released (Hugging Face) form and the native one.

    python tools/convert_checkpoint.py hf-to-native --hf DIR --out DIR --recipe keye_30b_a3b
    python tools/convert_checkpoint.py native-to-hf --native DIR --out DIR
    python tools/convert_checkpoint.py warm-start --qwen DIR --vision DIR --out DIR --recipe R

Killed half-way, the same command continues. Training begins from a native folder with
--set training.checkpoint.weights=DIR. Exit status 2 when an argument or a checkpoint is wrong;
nothing is left then.
"""

import argparse
import os
import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where only a script's own folder is known

from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.files import worker_origin  # noqa: E402

if __name__ == "__main__":
    # Before the imports below: torch takes seconds, and workers import it on another core.
    worker_origin.start_early(
        ["megatron_keye.checkpoint.convert.to_hf", "megatron_keye.checkpoint.convert.to_native"]
    )

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar  # noqa: E402

from megatron_keye.checkpoint.convert import convert  # noqa: E402
from megatron_keye.checkpoint.convert.warm_start import warm_start  # noqa: E402
from megatron_keye.config import RunConfig  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402

USER_ERROR = 2
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIGABYTE = 1_000_000_000


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
        with Watched(options.direction) as progress:
            run_conversion(options, progress)
    except (UserError, OSError) as error:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
