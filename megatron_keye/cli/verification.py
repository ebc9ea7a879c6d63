"""Runs a checkpoint once or twice on one device and prints how far the numbers are apart."""

import argparse
from pathlib import Path

import numpy as np
import torch

from megatron_keye.checkpoint.hf.folder import HfFolder, open_hf
from megatron_keye.parallel.process import resolve_device
from megatron_keye.verify.compare import LAYERED, Arrays, compare, largest
from megatron_keye.verify.dump import dump
from megatron_keye.verify.dump_inputs import DumpInputs, inputs_from_arrays, read_inputs
from megatron_keye.verify.one_process import OneProcessModel, Precision, alone
from megatron_keye.verify.qwen3_moe import check_text, run_qwen3_moe
from megatron_keye.verify.sample_inputs import sample_multimodal, sample_text

TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float64": "fp64"}


def verify_on_device(arguments: argparse.Namespace) -> bool:
    """Do what the command line says; return whether every comparison passes.

    Raises:
        UserError: For wrong folders or inputs.
    """
    device = resolve_device(arguments.device, 0)
    folder = open_hf(arguments.hf)
    if folder.unused:
        print(f"{len(folder.unused)} tensors are not part of the model: {folder.unused[0]} ...")
    inputs = choose_inputs(arguments, folder)
    with alone(device):
        return verify(arguments, folder, inputs, device)


def choose_inputs(arguments: argparse.Namespace, folder: HfFolder) -> DumpInputs:
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


def report(title: str, ours: Arrays, theirs: Arrays, arguments: argparse.Namespace) -> bool:
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
    arguments: argparse.Namespace, folder: HfFolder, inputs: DumpInputs, device: torch.device
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
