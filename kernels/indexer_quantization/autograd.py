"""Ties the 8-bit rounding of either implementation into autograd.

The rounding counts as the identity, and the rotation is its own transpose.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_quantization import reference


# Not traced: the compiler of torch 2.11 gives gradients of 0 where a conversion to the type that
# a tensor has already is the last step of a function's forward.
@torch.compiler.disable
def round_to_fp8(vectors: Tensor, impl: str) -> Tensor:
    """Return the rounded vectors; see api.round_to_fp8."""
    rounded: Tensor = (_RoundOnGpu if impl == "triton" else _RoundEagerly).apply(vectors)
    return rounded


class _RoundEagerly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        return reference.dequantize(*reference.quantize(vectors), vectors.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reference.rotate(gradient)


class _RoundOnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        triton = import_module("megatron_keye.kernels.indexer_quantization.triton")
        rounded: Tensor = triton.rotate(vectors, is_rounded=True)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        triton = import_module("megatron_keye.kernels.indexer_quantization.triton")
        rotated: Tensor = triton.rotate(gradient, is_rounded=False)
        return rotated
