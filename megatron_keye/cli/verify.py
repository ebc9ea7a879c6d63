"""Runs a checkpoint and says how far it is from another form or implementation of the model.

    megatron-keye verify --hf DIR --native DIR
        both forms give the same numbers
    megatron-keye verify --hf DIR --against qwen3-moe
        transformers gives the same numbers on short text
    megatron-keye verify --hf DIR --inputs IN.npz --dump OUT.npz [--gradients]
        everything computed, to compare with any implementation

Inputs: input_ids int64 [T]; optional pixel_values and pixel_values_videos float32
[P, 3, patch, patch] (raster order within each image or frame) with image_grid_thw and
video_grid_thw int64 [n, 3], one row [1, h, w] per image or frame; cu_seqlens int64 [d+1];
position_ids int64 [3, T]; targets int64 [T], already shifted, -100 = ignored. Outputs:
megatron_keye/verify/dump.py. Without --inputs, random ones are drawn.

Exit status 0 when all deviations are within --tolerance times the largest magnitude of their
array (or 1, if that is smaller), 1 when not, 2 for wrong arguments or files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import FAILED, tells_user_errors


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("megatron-keye verify", __doc__)
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    add("--native", type=Path, metavar="DIR", help="sharded checkpoint to compare it with")
    add("--against", choices=["qwen3-moe"], help="transformers model to compare it with")
    add("--inputs", type=Path, metavar="FILE.npz", help="inputs; random ones by default")
    add("--dump", type=Path, metavar="OUT.npz", help="where to write what was computed")
    add("--gradients", action="store_true", help="also dump gradients; needs targets")
    add("--dtype", choices=["float32", "float64"], default="float32", help="no TF32 (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    add("--layers", action="store_true", help="tell the deviation of each layer")
    add("--tolerance", type=float, help="largest deviation that passes (1e-5; float64 1e-10)")
    add("--seed", type=int, default=0, help="seed of random inputs (%(default)s)")
    return parser.parse_args(words)


@tells_user_errors
def main(words: Sequence[str]) -> int:
    """Verify, and return the exit status."""
    arguments = parse_arguments(words)
    # Late, since torch takes seconds to import.
    quieten_libraries()
    from megatron_keye.cli.verification import verify_on_device

    return 0 if verify_on_device(arguments) else FAILED
