# SPDX-License-Identifier: Apache-2.0
"""Adapters in native checkpoints: which ones a folder holds, and whether a run can take them."""

from collections.abc import Iterable
from pathlib import Path

from megatron_keye.checkpoint.convert.to_native import native_shapes
from megatron_keye.checkpoint.saved_run import read_saved_run
from megatron_keye.config.lora import LoraConfig, is_adapter
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

MERGE = (
    "merge them into the weights with megatron-keye convert native-to-hf, and make a native "
    "checkpoint of the result with hf-to-native"
)
"""What to do with a checkpoint whose adapters a run can't take."""


def holds_adapters(names: Iterable[str]) -> bool:
    """Return whether a checkpoint with tensors of these names has adapters."""
    return any(map(is_adapter, names))


def shapes_with_adapters(run: RunConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every native tensor that a checkpoint should hold, by its name.

    Args:
        run: Sizes, and adapters, which a checkpoint that a run with adapters starts from may lack.
        names: Names of the tensors that it holds.
    """
    weights = native_shapes(run.model)
    return weights | (run.training.lora.adapter_shapes(weights) if holds_adapters(names) else {})


def check_adapters(folder: Path, names: Iterable[str], run: RunConfig) -> None:
    """Raise unless a new run can take the adapters of the checkpoint whose weights it starts from.

    Args:
        folder: The checkpoint.
        names: Names of its tensors.
        run: The run that begins; it may have adapters that the checkpoint lacks.

    Raises:
        UserError: When the checkpoint has adapters and the run has none, or others.
    """
    lora = run.training.lora
    if not holds_adapters(names):
        return
    saved = read_saved_run(folder).training.lora
    if lora.is_on and lora.is_same(saved):
        return
    raise UserError(
        f"training.checkpoint.weights: got {folder} with adapters of {_describe(saved)}, expected "
        f"those of this run, which has {_describe(lora)}; set training.lora as it was saved, or "
        f"{MERGE}"
    )


def _describe(lora: LoraConfig) -> str:
    if not lora.is_on:
        return "none (training.lora.rank=0)"
    return f"rank {lora.rank}, alpha {lora.alpha:g} and targets {','.join(lora.targets)}"
