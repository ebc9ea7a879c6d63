# SPDX-License-Identifier: Apache-2.0
"""Dense attention through torch's own operators where a graph is made and ranges are unknown.

Forward and backward pass are a leaf each, which finds the trapezoids when it runs. What torch's
operators hand from one to the other differs between them and with the trapezoids, and a graph
holds only tensors of known shapes, so the backward pass attends once more.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.dense_attention import sdpa
from megatron_keye.kernels.registration import fake_gradients, opaque
from megatron_keye.kernels.trapezoids import find_trapezoids


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH; see api.dense_attention_with_lse."""
    ranges = key_start_T, key_end_T, key_reach_S
    out_THC, lse_TH = _DenseAttention.apply(q_THC, k_SGC, v_SGC, *ranges, scale)
    return out_THC, lse_TH


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_SGC: Tensor,
        v_SGC: Tensor,
        key_start_T: Tensor,
        key_end_T: Tensor,
        key_reach_S: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        inputs = q_THC, k_SGC, v_SGC, key_start_T, key_end_T, key_reach_S
        ctx.save_for_backward(*inputs)
        ctx.scale = scale
        out_THC, lse_TH = _attend(*inputs, scale)
        ctx.mark_non_differentiable(lse_TH)
        return out_THC, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SGC, v_SGC, *ranges = ctx.saved_tensors
        key_start_T, key_end_T, key_reach_S = ranges
        inputs = q_THC, k_SGC, v_SGC, key_start_T, key_end_T, key_reach_S
        gradients = _attend_backward(dout_THC, *inputs, ctx.scale)
        return *gradients, None, None, None, None


def _fake_attend(q_THC: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_type = torch.promote_types(q_THC.dtype, torch.float32)
    return q_THC.new_empty(q_THC.shape), q_THC.new_empty(q_THC.shape[:2], dtype=lse_type)


@opaque("attend_to_trapezoids", _fake_attend)
def _attend(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    trapezoids = find_trapezoids(key_start_T, key_end_T, key_reach_S)
    out_THC, lse_TH = sdpa.dense_attention(q_THC, k_SGC, v_SGC, trapezoids, scale=scale)
    return out_THC.contiguous(), lse_TH.contiguous()


@opaque("attend_to_trapezoids_backward", fake_gradients)
def _attend_backward(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    trapezoids = find_trapezoids(key_start_T, key_end_T, key_reach_S)
    heads = q_THC, k_SGC, v_SGC
    gradients = sdpa.differentiate(dout_THC, *heads, trapezoids, scale=scale)
    dq_THC, dk_SGC, dv_SGC = (each.contiguous() for each in gradients)
    return dq_THC, dk_SGC, dv_SGC
