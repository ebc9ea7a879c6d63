# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints between the released (Hugging Face) form and the native one of training.

    megatron-keye convert hf-to-native --hf DIR --out DIR --recipe keye_30b_a3b
    megatron-keye convert native-to-hf --native DIR --out DIR
    megatron-keye convert native-to-hf --native DIR --out DIR --adapter
    megatron-keye convert warm-start --qwen DIR --vision DIR --out DIR --recipe keye_30b_a3b

A killed conversion continues when the same command is run again. To train from the result, pass
--set training.checkpoint.weights=DIR. Tokenizer, template, processor and code files of the source
travel along, through training's checkpoints too; native-to-hf says what a server will miss.
Exit status 2 for a wrong argument or checkpoint, which leaves no output behind.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_keye.cli.arguments import (
    add_folder,
    add_recipe_option,
    add_workers,
    chosen_run,
    chosen_workers,
    make_parser,
)
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.progress import ProgressBar, byte_bar
from megatron_keye.cli.status import report_error, reports_user_errors
from megatron_keye.errors import UserError
from megatron_keye.files import worker_origin

if TYPE_CHECKING:
    import torch

GIGABYTE = 1_000_000_000


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye convert", __doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_native = directions.add_parser("hf-to-native", help="released checkpoint to native")
    add_folder(to_native, "--hf", "released checkpoint", required=True)
    to_hf = directions.add_parser("native-to-hf", help="native checkpoint to released")
    add_folder(to_hf, "--native", "native checkpoint", required=True)
    to_hf.add_argument(
        "--expert-layout",
        choices=("fused", "per-expert"),
        default="fused",
        help="one tensor for all experts of a layer, or one per expert; default: fused",
    )
    to_hf.add_argument(
        "--require-complete",
        action="store_true",
        help="fail where a file that a server needs is missing, instead of naming it",
    )
    to_hf.add_argument(
        "--shard-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of one file; default: 5",
    )
    to_hf.add_argument(
        "--adapter",
        action="store_true",
        help="export the adapters (training.lora) alone, in the format of PEFT; default: merge "
        "them into the weights",
    )
    warm = directions.add_parser(
        "warm-start", help="native checkpoint from those of Qwen3-MoE and of a vision encoder"
    )
    add_folder(warm, "--qwen", "Qwen3-MoE checkpoint", required=True)
    add_folder(warm, "--vision", "Keye-VL-1.5 or SigLIP checkpoint; default: random weights")
    for parsed in (to_native, warm):
        add_recipe_option(parsed)
    for parsed in (to_hf, warm):
        add_folder(
            parsed,
            "--files-from",
            "folder with tokenizer, processor and code files, which are added to those that the "
            "checkpoint carries, or replace them",
        )
    for parsed in (to_native, to_hf, warm):
        _add_common(parsed)
    return parser.parse_args(arguments)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "--out", "folder to write; must not exist", required=True)
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="type of the result; default: as in the source"
    )
    parser.add_argument("--check-finite", action="store_true", help="fail on NaN and Inf")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="ignore tensors that match; repeatable; for example 'visual.vision_model.head.*'",
    )
    add_workers(parser)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Convert a checkpoint and return the exit status."""
    options = parse_arguments(arguments)
    quieten_libraries()
    if chosen_workers(options) > 1:
        # Torch takes seconds to import; workers import it while this process does.
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
        return report_error(error)
    sys.stdout.write(f"{options.out}\n")
    return 0


def convert(options: argparse.Namespace, progress: ProgressBar) -> None:
    """Run the conversion that the command line describes."""
    import torch

    from megatron_keye.checkpoint.convert import convert as conversions

    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    conversion = conversions.Options(
        num_workers=chosen_workers(options),
        dtype=types.get(options.dtype),
        checks_finite=options.check_finite,
        dropped=tuple(options.drop),
        progress=progress,
    )
    if options.direction == "native-to-hf" and options.adapter:
        export_adapter(options, conversion.dtype)
        return
    if options.direction == "native-to-hf":
        conversions.native_to_hf(
            options.native,
            options.out,
            conversion,
            layout=options.expert_layout,
            file_bytes=int(options.shard_gigabytes * GIGABYTE),
            files_from=options.files_from,
            needs_all_files=options.require_complete,
        )
        return
    run = chosen_run(options, num_ranks=1, has_gpu=True)
    if options.direction == "hf-to-native":
        conversions.hf_to_native(options.hf, options.out, run, conversion)
        return
    from megatron_keye.checkpoint.convert.warm_start import warm_start

    origins = warm_start(
        options.qwen,
        options.vision,
        options.out,
        run,
        conversion,
        files_from=options.files_from,
    )
    for origin, count in sorted(Counter(origins.values()).items()):
        sys.stdout.write(f"{count:6d} tensors from {origin}\n")


def export_adapter(options: argparse.Namespace, dtype: "torch.dtype | None") -> None:
    """Write the adapters alone."""
    from megatron_keye.checkpoint.convert.to_peft import native_to_peft

    if options.files_from is not None:
        raise UserError(
            "--files-from: got a folder, expected none with --adapter, which needs no tokenizer; "
            "leave one of the two out"
        )
    native_to_peft(
        options.native,
        options.out,
        dtype=dtype,
        checks_finite=options.check_finite,
        dropped=tuple(options.drop),
        layout=options.expert_layout,
    )
