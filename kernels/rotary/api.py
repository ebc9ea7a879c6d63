# SPDX-License-Identifier: Apache-2.0
"""Public function of the rotary positions: contract, checks and choice of implementation.

Shape letters: T tokens or patches, H heads, C channels of a head.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.rotary import reference

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere."""
TABLE_DTYPES = (torch.float32, torch.float64)
"""Types of cosines and sines; less would blur the angles of far positions."""


@composite("rotate")
def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, impl: str | None = None) -> Tensor:
    """Rotate the plane of channels c and c + C / 2 by its angle, for every c below C / 2.

    Differentiable in `x_THC`. Computed in the wider type of `x_THC` and the tables, rounded once.

    Args:
        x_THC: Queries or keys, any float type.
        cos_TC: Cosines, float32 or float64; both halves of C carry the same angles.
        sin_TC: Sines, likewise.
        impl: One of IMPLEMENTATIONS, or None for the default.

    Returns:
        Shape and type of `x_THC`.

    Raises:
        ValueError: On shapes, types or devices that do not fit, an odd C, or an unknown `impl`.

    Source: arXiv 2104.09864 (RoFormer), in the rotate-half order of channels.
    """
    takes_triton = suits_triton(x_THC, cos_TC, sin_TC)
    chosen = choose_impl("rotary", impl, IMPLEMENTATIONS, triton=takes_triton)
    sizes = check_shapes(x_THC=x_THC, cos_TC=cos_TC, sin_TC=sin_TC)
    check_dtypes(FLOAT_DTYPES, x_THC=x_THC)
    check_dtypes(TABLE_DTYPES, cos_TC=cos_TC, sin_TC=sin_TC)
    if sizes["C"] % 2 != 0:
        raise ValueError(f"x_THC: got C = {sizes['C']} channels, expected pairs; see head_dim")
    if chosen == "triton":
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.rotary.autograd")
        rotated_THC: Tensor = autograd.rotate(x_THC, cos_TC, sin_TC)
        return rotated_THC
    return reference.rotate(x_THC, cos_TC, sin_TC)
