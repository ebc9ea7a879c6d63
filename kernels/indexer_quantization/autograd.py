# SPDX-License-Identifier: Apache-2.0
"""Ties the 8-bit rounding of either implementation into autograd.

The rounding counts as the identity, and the rotation is its own transpose.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_quantization import reference
from megatron_keye.kernels.registration import opaque


def round_to_fp8(vectors: Tensor, impl: str) -> Tensor:
    """Return the rounded vectors; see api.round_to_fp8."""
    rounded: Tensor = _Round.apply(vectors, impl)
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, impl: str) -> Tensor:
        ctx.impl = impl
        return _rotate(vectors, impl, True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _rotate(gradient, ctx.impl, False), None


def _fake_rotate(vectors: Tensor, *_: object) -> Tensor:
    return vectors.new_empty(vectors.shape)


@opaque("rotate_channels", _fake_rotate)
def _rotate(vectors: Tensor, impl: str, is_rounded: bool) -> Tensor:
    """Return the rotated vectors, rounded to what `quantize` keeps or not."""
    if impl == "triton":
        triton = import_module("megatron_keye.kernels.indexer_quantization.triton")
        rotated: Tensor = triton.rotate(vectors, is_rounded=is_rounded)
        return rotated
    if is_rounded:
        return reference.dequantize(*reference.quantize(vectors), vectors.dtype)
    return reference.rotate(vectors)
