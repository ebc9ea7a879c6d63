"""Runs a checkpoint and says how far it is from another form or implementation of the model.

    python tools/verify_checkpoint.py --hf DIR --native DIR      both forms give the same numbers
    python tools/verify_checkpoint.py --hf DIR --against qwen3-moe
                                     transformers gives the same numbers on short text
    python tools/verify_checkpoint.py --hf DIR --inputs IN.npz --dump OUT.npz [--gradients]
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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megatron_keye.checkpoint.hf.folder import HfFolder, open_hf
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import resolve_device
from megatron_keye.verify.compare import LAYERED, Arrays, compare, largest
from megatron_keye.verify.dump import dump
from megatron_keye.verify.dump_inputs import DumpInputs, inputs_from_arrays, read_inputs
from megatron_keye.verify.one_process import OneProcessModel, Precision, alone
from megatron_keye.verify.qwen3_moe import check_text, run_qwen3_moe
from megatron_keye.verify.sample_inputs import sample_multimodal, sample_text

Dtype = Literal["float32", "float64"]

TOLERANCES: dict[Dtype, float] = {"float32": 1e-5, "float64": 1e-10}
PRECISIONS: dict[Dtype, Precision] = {"float32": "fp32", "float64": "fp64"}
USER_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line; one docstring a field would repeat its --help."""

    hf: Path
    native: Path | None
    against: str | None
    inputs: Path | None
    dump: Path | None
    gradients: bool
    dtype: Dtype
    device: Literal["auto", "cpu", "cuda"]
    layers: bool
    tolerance: float | None
    seed: int


def parse(words: list[str] | None = None) -> Arguments:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    add("--native", type=Path, metavar="DIR", help="sharded checkpoint to compare it with")
    add("--against", choices=["qwen3-moe"], help="transformers model to compare it with")
    add("--inputs", type=Path, metavar="FILE.npz", help="inputs; random ones by default")
    add("--dump", type=Path, metavar="OUT.npz", help="where to write what was computed")
    add("--gradients", action="store_true", help="also dump gradients; needs targets")
    add("--dtype", choices=list(TOLERANCES), default="float32", help="no TF32 (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    add("--layers", action="store_true", help="tell the deviation of each layer")
    add("--tolerance", type=float, help="largest deviation that passes (1e-5; float64 1e-10)")
    add("--seed", type=int, default=0, help="seed of random inputs (%(default)s)")
    return Arguments(**vars(parser.parse_args(words)))


def choose_inputs(arguments: Arguments, folder: HfFolder) -> DumpInputs:
    """Return the user's inputs, or random ones that suit the comparison."""
    if arguments.inputs is not None:
        inputs = read_inputs(arguments.inputs, folder.model)
    else:
        sample = sample_text if arguments.against else sample_multimodal
        inputs = inputs_from_arrays(sample(folder.model, arguments.seed), folder.model)
    if arguments.against is not None:
        check_text(inputs, folder.model)
    return inputs


def write_dump(path: Path, arrays: Arrays) -> None:
    """Write an .npz file under another name and rename it when it is whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def report(title: str, ours: Arrays, theirs: Arrays, arguments: Arguments) -> bool:
    """Print deviations and return whether all are within the tolerance."""
    given = arguments.tolerance
    tolerance = TOLERANCES[arguments.dtype] if given is None else given
    deviations = compare(ours, theirs, by_layer=arguments.layers)
    worst = largest(deviations)
    print(f"{title}, {arguments.dtype}")
    for deviation in deviations:
        print(f"  {deviation}")
    passes = worst.is_within(tolerance)
    verdict = "within" if passes else "ABOVE"
    print(f"{verdict} {tolerance:g} of each array's scale; {worst}")
    return passes


def verify(
    arguments: Arguments, folder: HfFolder, inputs: DumpInputs, device: torch.device
) -> bool:
    """Load, run, dump and compare; return whether every comparison passes."""
    precision = PRECISIONS[arguments.dtype]
    model = OneProcessModel(folder.model, device, precision)
    model.load_hf(folder)
    gradients_as = folder.layout if arguments.gradients else None
    ours = dump(model, inputs, gradients_as=gradients_as)
    if arguments.dump is not None:
        write_dump(arguments.dump, ours)
        print(f"wrote {len(ours)} arrays to {arguments.dump}")
    passes = True
    if arguments.against is not None:
        theirs = run_qwen3_moe(folder, model, inputs)
        passes &= report(f"{folder.path} against {arguments.against}", ours, theirs, arguments)
    if arguments.native is not None:
        model.load_native(arguments.native)
        theirs = dump(model, inputs, gradients_as=gradients_as)
        passes &= report(f"{folder.path} against {arguments.native}", ours, theirs, arguments)
    if arguments.native is None and arguments.against is None:
        describe(ours)
    return passes


def describe(arrays: Arrays) -> None:
    """Print shape and range of what was computed, gradients left out."""
    for name, array in arrays.items():
        if array.size and not name.startswith("grad."):
            kind = " by layer" if name in LAYERED else ""
            low, high = float(array.min()), float(array.max())
            print(f"  {name} {list(array.shape)}{kind}: {low:.6g} to {high:.6g}")


def main(words: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    arguments = parse(words)
    try:
        device = resolve_device(arguments.device, 0)
        folder = open_hf(arguments.hf)
        if folder.unused:
            print(
                f"{len(folder.unused)} tensors are not part of the model: {folder.unused[0]} ..."
            )
        inputs = choose_inputs(arguments, folder)
        with alone(device):
            return 0 if verify(arguments, folder, inputs, device) else 1
    except UserError as error:
        print(f"verify_checkpoint: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
