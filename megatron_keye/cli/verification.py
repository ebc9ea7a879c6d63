# SPDX-License-Identifier: Apache-2.0
"""Runs a checkpoint on one device and prints deviations from another form of the model."""

import argparse
from pathlib import Path

import numpy as np
import torch

from megatron_keye.checkpoint.hf.folder import HfFolder, open_hf
from megatron_keye.files.disk import making
from megatron_keye.parallel.process import resolve_device
from megatron_keye.verify.compare import LAYERED, Arrays, compare, largest
from megatron_keye.verify.dump import dump
from megatron_keye.verify.dump_inputs import DumpInputs, inputs_from_arrays, read_inputs
from megatron_keye.verify.one_process import OneProcessModel, Precision, alone
from megatron_keye.verify.qwen3_moe import check_text, run_qwen3_moe
from megatron_keye.verify.sample_inputs import sample_multimodal, sample_text

TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float64": "fp64"}


def verify_on_device(options: argparse.Namespace) -> bool:
    """Verify as the command line describes; return whether every comparison passes.

    Raises:
        UserError: For wrong folders or inputs.
    """
    device = resolve_device(options.device, 0)
    folder = open_hf(options.hf)
    if folder.unused:
        print(f"{len(folder.unused)} tensors are not part of the model: {folder.unused[0]} ...")
    inputs = choose_inputs(options, folder)
    with alone(device):
        return verify(options, folder, inputs, device)


def choose_inputs(options: argparse.Namespace, folder: HfFolder) -> DumpInputs:
    """Return the inputs of --inputs, or random ones that suit the comparison."""
    if options.inputs is not None:
        inputs = read_inputs(options.inputs, folder.model)
    else:
        sample = sample_text if options.against else sample_multimodal
        inputs = inputs_from_arrays(sample(folder.model, options.seed), folder.model)
    if options.against is not None:
        check_text(inputs, folder.model)
    return inputs


def write_dump(path: Path, arrays: Arrays) -> None:
    """Write an .npz file under a temporary name and rename it once it is complete."""
    partial = path.with_name(path.name + ".partial")
    with making(partial, "the dump"):
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)


def report(title: str, ours: Arrays, theirs: Arrays, options: argparse.Namespace) -> bool:
    """Print the deviations and return whether all are within the tolerance."""
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = TOLERANCES[options.dtype]
    deviations = compare(ours, theirs, by_layer=options.layers)
    worst = largest(deviations)
    print(f"{title}, {options.dtype}")
    for deviation in deviations:
        print(f"  {deviation}")
    passes = worst.is_within(tolerance)
    verdict = "within" if passes else "ABOVE"
    print(f"{verdict} {tolerance:g} of each array's scale; {worst}")
    return passes


def verify(
    options: argparse.Namespace, folder: HfFolder, inputs: DumpInputs, device: torch.device
) -> bool:
    """Load, run, dump and compare; return whether every comparison passes."""
    precision = PRECISIONS[options.dtype]
    model = OneProcessModel(folder.model, device, precision)
    model.load_hf(folder)
    gradients_as = folder.layout if options.gradients else None
    ours = dump(model, inputs, gradients_as=gradients_as)
    if options.dump is not None:
        write_dump(options.dump, ours)
        print(f"wrote {len(ours)} arrays to {options.dump}")
    passes = True
    if options.against is not None:
        theirs = run_qwen3_moe(folder, model, inputs)
        passes &= report(f"{folder.path} against {options.against}", ours, theirs, options)
    if options.native is not None:
        model.load_native(options.native)
        theirs = dump(model, inputs, gradients_as=gradients_as)
        passes &= report(f"{folder.path} against {options.native}", ours, theirs, options)
    if options.native is None and options.against is None:
        describe(ours)
    return passes


def describe(arrays: Arrays) -> None:
    """Print shape and range of every array but gradients."""
    for name, array in arrays.items():
        if array.size and not name.startswith("grad."):
            kind = " by layer" if name in LAYERED else ""
            low, high = float(array.min()), float(array.max())
            print(f"  {name} {list(array.shape)}{kind}: {low:.6g} to {high:.6g}")
