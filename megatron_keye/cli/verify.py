# SPDX-License-Identifier: Apache-2.0
"""Runs a checkpoint and compares the results with another form or implementation of the model.

    megatron-keye verify --hf DIR --native DIR
        compares both forms of the checkpoint
    megatron-keye verify --hf DIR --against qwen3-moe
        compares with transformers, on short text
    megatron-keye verify --hf DIR --inputs IN.npz --dump OUT.npz [--gradients]
        writes all results, to compare with any implementation

Inputs: input_ids int64 [T]; optional pixel_values and pixel_values_videos float32
[P, 3, patch, patch] (raster order within each image or frame) with image_grid_thw and
video_grid_thw int64 [n, 3], one row [1, h, w] per image or frame; cu_seqlens int64 [d+1];
position_ids int64 [3, T]; targets int64 [T], already shifted, -100 = ignored. Outputs:
see megatron_keye/verify/dump.py. Without --inputs, random ones are used.

Exit status 0 when no deviation exceeds --tolerance times max(1, largest magnitude of its array),
1 when one does, 2 for wrong arguments or files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import add_folder, make_parser
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import FAILED, reports_user_errors


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye verify", __doc__)
    add_folder(parser, "--hf", "Hugging Face checkpoint", required=True)
    add_folder(parser, "--native", "native checkpoint to compare with")
    add = parser.add_argument
    add("--against", choices=["qwen3-moe"], help="transformers model to compare with")
    add("--inputs", type=Path, metavar="FILE.npz", help="inputs; default: random ones")
    add("--dump", type=Path, metavar="OUT.npz", help="file to write all results to")
    add("--gradients", action="store_true", help="also dump gradients; needs targets")
    add("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    add("--layers", action="store_true", help="print the deviation of each layer")
    add("--tolerance", type=float, metavar="X", help="default: 1e-5, for float64 1e-10")
    add("--seed", type=int, default=0, metavar="N", help="seed of random inputs; default: 0")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Verify and return the exit status."""
    options = parse_arguments(arguments)
    # Late, since torch takes seconds to import.
    quieten_libraries()
    from megatron_keye.cli.verification import verify_on_device

    return 0 if verify_on_device(options) else FAILED
