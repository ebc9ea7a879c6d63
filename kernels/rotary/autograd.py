# SPDX-License-Identifier: Apache-2.0
"""Ties the Triton rotation into autograd: gradients are rotated back, only the tables are kept."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.registration import opaque
from megatron_keye.kernels.rotary.triton import rotate_heads


def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Return the rotated heads; see api.rotate."""
    check_triton("rotary", x_THC, x_THC=x_THC, cos_TC=cos_TC, sin_TC=sin_TC)
    rotated_THC: Tensor = _Rotate.apply(x_THC, cos_TC.contiguous(), sin_TC.contiguous())
    return rotated_THC


def _fake_rotate(x_THC: Tensor, *_: object) -> Tensor:
    return x_THC.new_empty(x_THC.shape)


@opaque("rotate_heads", _fake_rotate)
def _rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, is_backward: bool) -> Tensor:
    return rotate_heads(x_THC, cos_TC, sin_TC, is_backward=is_backward)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _rotate(x_THC, cos_TC, sin_TC, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotate(gradient_THC, cos_TC, sin_TC, True), None, None
