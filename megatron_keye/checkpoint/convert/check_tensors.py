# SPDX-License-Identifier: Apache-2.0
"""Compares the tensors that a checkpoint holds with those that the model needs.

Every failure names the tensor, what was got and expected, and the flag that helps.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.parameter_shapes import PACKING_TABLE
from megatron_keye.checkpoint.hf.safetensors_index import TYPE_NAMES
from megatron_keye.errors import UserError

Shape = tuple[int, ...]
_NATIVE = ("decoder.", "vision.")
_REMEDY_FOR_NATIVE = (
    "this is another model's checkpoint; take the recipe and --set, or the run.json, that it was "
    "made with"
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_shapes(
    got: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    *,
    where: str,
    dropped: Iterable[str] = (),
) -> None:
    """Raise unless a checkpoint holds exactly the expected tensors.

    Args:
        got: Shapes in the checkpoint.
        expected: Shapes that the model needs.
        where: The folder, for error messages.
        dropped: Patterns of surplus names to ignore.

    Raises:
        UserError: For a missing, mis-shaped or surplus tensor.
    """
    for name, shape in expected.items():
        if name not in got:
            raise UserError(
                f"tensor {name}: got none in {where}, expected shape {list(shape)}; "
                f"{_remedy_for_missing(name)}"
            )
        if got[name] != shape:
            raise UserError(
                f"tensor {name}: got shape {list(got[name])} in {where}, expected {list(shape)}; "
                f"{_remedy_for_shape(name, got[name])}"
            )
    patterns = list(dropped)
    for name, shape in got.items():
        if name not in expected and not any(fnmatch(name, pattern) for pattern in patterns):
            raise UserError(
                f"tensor {name}: got shape {list(shape)} in {where}, expected no such tensor; "
                f"{_remedy_for_surplus(name, shape)}"
            )


def check_types(
    types: Mapping[str, torch.dtype], *, where: str, wanted: torch.dtype | None
) -> torch.dtype:
    """Return the type to write: the wanted one, or that of all tensors.

    Args:
        types: Types in the checkpoint, of the tensors that are converted.
        where: The folder, for error messages.
        wanted: Type to round to; None keeps what all tensors have.

    Raises:
        UserError: For a tensor that holds no floating numbers, or types that differ.
    """
    common = Counter(types.values()).most_common(1)[0][0]
    for name, dtype in types.items():
        if dtype not in _FLOATS:
            known = ", ".join(TYPE_NAMES[each] for each in _FLOATS)
            raise UserError(
                f"tensor {name}: got type {TYPE_NAMES.get(dtype, dtype)} in {where}, expected "
                f"{known}; a quantised checkpoint can't be converted, take the original"
            )
        if wanted is None and dtype != common:
            raise UserError(
                f"tensor {name}: got type {TYPE_NAMES[dtype]} in {where}, expected "
                f"{TYPE_NAMES[common]} as most tensors have; choose one for all with --dtype"
            )
    return wanted or common


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a UserError when a tensor holds NaN or Inf."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise UserError(
            f"tensor {name}: got {bad} of {tensor.numel()} numbers that are NaN or Inf, expected "
            "none; take an earlier checkpoint, or omit --check-finite to convert it anyway"
        )


def _remedy_for_missing(name: str) -> str:
    if name.startswith(_NATIVE):
        return _REMEDY_FOR_NATIVE
    if name == PACKING_TABLE:
        return "it is unused, omit it with --set model.vision.num_packing_positions=0"
    if name == "lm_head.weight":
        return "a model that ties its output layer to the embedding is another one"
    if ".sa_indexer." in name or name.startswith(("visual.", "mlp_AR.")):
        return "to begin from a plain Qwen3 folder, use warm-start instead of hf-to-native"
    return "complete the folder, or correct the sizes with --recipe or --set model...."


def _remedy_for_shape(name: str, got: Shape) -> str:
    if name.startswith(_NATIVE):
        return _REMEDY_FOR_NATIVE
    if name == PACKING_TABLE:
        return f"correct the recipe with --set model.vision.num_packing_positions={got[0]}"
    return "correct the sizes with --recipe or --set model...."


def _remedy_for_surplus(name: str, shape: Shape) -> str:
    if name.startswith(_NATIVE):
        return _REMEDY_FOR_NATIVE
    if name == PACKING_TABLE:
        return f"keep it with --set model.vision.num_packing_positions={shape[0]}"
    return f"correct the sizes with --set model...., or ignore it with --drop '{name}'"
