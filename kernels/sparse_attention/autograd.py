# SPDX-License-Identifier: Apache-2.0
"""Ties the sparse attention's kernels into autograd.

Between forward and backward it keeps the inputs, the output, one number per row and the union
lists, never a matrix of queries by keys.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.registration import fake_gradients, opaque
from megatron_keye.kernels.sparse_attention import cuda, triton, triton_backward
from megatron_keye.kernels.sparse_attention.triton import lay_out_heads
from megatron_keye.kernels.sparse_attention.triton_target import recover_target
from megatron_keye.kernels.union_lists import UnionLists, union_lists


def sparse_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    deterministic: bool,
    with_target: bool,
    kept: KeptOutputs,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and target_TGK; see api.sparse_attention."""
    if impl == "cuda":
        cuda.check_call(q_THC, k_SGC, scale)
    check_triton("sparse_attention", q_THC, q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    out_THC, target_TGK = _SparseAttention.apply(
        q_THC, k_SGC, v_SGC, indices_TK, scale, deterministic, with_target, kept, impl
    )
    return out_THC, target_TGK


def _fake_attend(q_THC: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q_THC.new_empty(q_THC.shape), q_THC.new_empty(q_THC.shape[:2], dtype=torch.float32)


@opaque("attend_to_unions", _fake_attend)
def attend(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    keys_BU: Tensor,
    masks_BU: Tensor,
    counts_B: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH of an implementation; see triton.attend."""
    lists = UnionLists(keys_BU, masks_BU, counts_B)
    implementation = cuda.attend if impl == "cuda" else triton.attend
    return implementation(q_THC, k_SGC, v_SGC, lists, scale=scale)


def _fake_recover_target(
    q_THC: Tensor, k_SGC: Tensor, lse_TH: Tensor, indices_TK: Tensor, *_: object
) -> Tensor:
    num_queries, num_selected = indices_TK.shape
    return lse_TH.new_empty((num_queries, k_SGC.shape[1], num_selected))


@opaque("recover_target", _fake_recover_target)
def _recover_target(
    q_THC: Tensor, k_SGC: Tensor, lse_TH: Tensor, indices_TK: Tensor, scale: float
) -> Tensor:
    return recover_target(q_THC, k_SGC, lse_TH, indices_TK, scale=scale)


@opaque("attend_to_unions_backward", fake_gradients)
def attend_backward(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    keys_BU: Tensor,
    masks_BU: Tensor,
    counts_B: Tensor,
    scale: float,
    is_deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_THC, dk_SGC and dv_SGC of an implementation; see triton_backward."""
    heads, lists = (q_THC, k_SGC, v_SGC, out_THC, lse_TH), UnionLists(keys_BU, masks_BU, counts_B)
    if impl == "cuda" and cuda.BACKWARD != "triton" and not is_deterministic:
        in_bulk = cuda.BACKWARD == "bulk"
        return cuda.attend_backward(dout_THC, *heads, lists, scale=scale, in_bulk=in_bulk)
    return triton_backward.attend_backward(
        dout_THC, *heads, lists, scale=scale, is_deterministic=is_deterministic
    )


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_SGC: Tensor,
        v_SGC: Tensor,
        indices_TK: Tensor,
        scale: float,
        deterministic: bool,
        with_target: bool,
        kept: KeptOutputs,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        q_THC, k_SGC, v_SGC = lay_out_heads(q_THC, k_SGC, v_SGC)
        lists = union_lists(indices_TK, k_SGC.shape[0], impl="triton")
        out_THC, lse_TH = kept.outputs_of(
            "sparse_attention", lambda: attend(q_THC, k_SGC, v_SGC, *lists, scale, impl)
        )
        wanted_TK = indices_TK if with_target else indices_TK[:, :0]
        target_TGK = _recover_target(q_THC, k_SGC, lse_TH, wanted_TK, scale)
        ctx.save_for_backward(q_THC, k_SGC, v_SGC, out_THC, lse_TH, *lists)
        ctx.scale, ctx.is_deterministic, ctx.impl = scale, deterministic, impl
        ctx.mark_non_differentiable(target_TGK)
        return out_THC, target_TGK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SGC, v_SGC, out_THC, lse_TH, keys_BU, masks_BU, counts_B = ctx.saved_tensors
        heads, lists = (q_THC, k_SGC, v_SGC, out_THC, lse_TH), (keys_BU, masks_BU, counts_B)
        gradients = attend_backward(
            dout_THC.contiguous(), *heads, *lists, ctx.scale, ctx.is_deterministic, ctx.impl
        )
        return (*gradients, None, None, None, None, None, None)
