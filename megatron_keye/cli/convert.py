"""Converts checkpoints between the released (Hugging Face) form and the native one.

    megatron-keye convert hf-to-native --hf DIR --out DIR --recipe keye_30b_a3b
    megatron-keye convert native-to-hf --native DIR --out DIR
    megatron-keye convert warm-start --qwen DIR --vision DIR --out DIR --recipe keye_30b_a3b

Killed half-way, the same command continues. Training begins from a native folder with
--set training.checkpoint.weights=DIR. Exit status 2 when an argument or a checkpoint is wrong;
nothing is left then.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import (
    add_recipe_option,
    add_workers,
    chosen_run,
    chosen_workers,
    make_parser,
)
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.progress import ProgressBar, byte_bar
from megatron_keye.cli.status import tell, tells_user_errors
from megatron_keye.files import worker_origin

GIGABYTE = 1_000_000_000


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("megatron-keye convert", __doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_native = directions.add_parser("hf-to-native", help="released checkpoint to native")
    to_native.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="released checkpoint"
    )
    to_hf = directions.add_parser("native-to-hf", help="native checkpoint to released")
    to_hf.add_argument(
        "--native", type=Path, required=True, metavar="DIR", help="native checkpoint"
    )
    to_hf.add_argument(
        "--expert-layout",
        choices=("fused", "per-expert"),
        default="fused",
        help="one tensor for all experts of a layer, or one for each; default: fused",
    )
    to_hf.add_argument(
        "--files-from",
        type=Path,
        metavar="DIR",
        help="folder with tokenizer and processor files; default: those the checkpoint carries",
    )
    to_hf.add_argument(
        "--shard-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="most of one file; default: 5",
    )
    warm = directions.add_parser("warm-start", help="native from Qwen3 and a vision encoder")
    warm.add_argument("--qwen", type=Path, required=True, metavar="DIR", help="Qwen3 checkpoint")
    warm.add_argument("--vision", type=Path, metavar="DIR", help="Keye-VL-1.5 or SigLIP folder")
    for parsed in (to_native, warm):
        add_recipe_option(parsed)
    for parsed in (to_native, to_hf, warm):
        _add_common(parsed)
    return parser.parse_args(arguments)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="round to this type; default: keep"
    )
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and Inf")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="pass over surplus tensors, for example 'visual.vision_model.head.*'",
    )
    add_workers(parser)


@tells_user_errors
def main(arguments: Sequence[str]) -> int:
    """Convert, and return the exit status."""
    options = parse_arguments(arguments)
    quieten_libraries()
    if chosen_workers(options) > 1:
        # Torch takes seconds to import: workers do it on another core at the same time.
        worker_origin.start_early(
            [
                "megatron_keye.checkpoint.convert.to_hf",
                "megatron_keye.checkpoint.convert.to_native",
            ]
        )
    try:
        with byte_bar(options.direction) as progress:
            convert(options, progress)
    except OSError as error:
        return tell(error)
    sys.stdout.write(f"{options.out}\n")
    return 0


def convert(options: argparse.Namespace, progress: ProgressBar) -> None:
    """Do what the command line says."""
    import torch

    from megatron_keye.checkpoint.convert import convert as conversions

    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    how = conversions.Options(
        num_workers=chosen_workers(options),
        dtype=types.get(options.dtype),
        checks_finite=options.check_finite,
        dropped=tuple(options.drop),
        progress=progress,
    )
    if options.direction == "native-to-hf":
        conversions.native_to_hf(
            options.native,
            options.out,
            how,
            layout=options.expert_layout,
            file_bytes=int(options.shard_gigabytes * GIGABYTE),
            carried_from=options.files_from,
        )
        return
    run = chosen_run(options, num_ranks=1, has_gpu=True)
    if options.direction == "hf-to-native":
        conversions.hf_to_native(options.hf, options.out, run, how)
        return
    from megatron_keye.checkpoint.convert.warm_start import warm_start

    origins = warm_start(options.qwen, options.vision, options.out, run, how)
    for origin, count in sorted(Counter(origins.values()).items()):
        sys.stdout.write(f"{count:6d} tensors from {origin}\n")
