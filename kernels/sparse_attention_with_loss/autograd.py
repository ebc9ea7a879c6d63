# SPDX-License-Identifier: Apache-2.0
"""Attention and loss as one node of autograd, whose backward pass makes the target.

Of the size of queries by selected keys only scores and their gradient exist: Triton gathers the
target for a part of the queries at a time, which learn from it at once, and CUDA never stores it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.row_chunks import rows_of_chunk
from megatron_keye.kernels.sparse_attention import cuda
from megatron_keye.kernels.sparse_attention.autograd import attend, attend_backward
from megatron_keye.kernels.sparse_attention.triton import lay_out_heads
from megatron_keye.kernels.sparse_attention.triton_target import recover_target
from megatron_keye.kernels.sparse_attention_with_loss import cuda as cuda_loss
from megatron_keye.kernels.sparse_indexer_loss.triton import fill_divergence_and_gradient
from megatron_keye.kernels.union_lists import UnionLists, union_lists


def sparse_attention_with_loss(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scores_TK: Tensor,
    weight_T: Tensor,
    report: Callable[[Tensor], None],
    *,
    scale: float,
    deterministic: bool,
    kept: KeptOutputs,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and loss; see api.sparse_attention_with_loss.

    With `impl` "cuda" the attention's passes are those that `sparse_attention` takes then.
    """
    if impl == "cuda":
        cuda.check_call(q_THC, k_SGC, scale)
    operator, heads = "sparse_attention_with_loss", {"q_THC": q_THC, "k_SGC": k_SGC}
    check_triton(operator, q_THC, **heads, v_SGC=v_SGC, scores_TK=scores_TK)
    out_THC, loss = _AttentionWithLoss.apply(
        q_THC,
        k_SGC,
        v_SGC,
        scores_TK,
        indices_TK,
        weight_T,
        report,
        scale,
        deterministic,
        kept,
        impl,
    )
    return out_THC, loss


class _AttentionWithLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_SGC: Tensor,
        v_SGC: Tensor,
        scores_TK: Tensor,
        indices_TK: Tensor,
        weight_T: Tensor,
        report: Callable[[Tensor], None],
        scale: float,
        deterministic: bool,
        kept: KeptOutputs,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        heads = lay_out_heads(q_THC, k_SGC, v_SGC)
        lists = union_lists(indices_TK, k_SGC.shape[0], impl="triton")
        out_THC, lse_TH = kept.outputs_of(
            "sparse_attention", lambda: attend(*heads, *lists, scale, impl)
        )
        selected = indices_TK, scores_TK.contiguous(), weight_T
        ctx.save_for_backward(*heads, out_THC, lse_TH, *selected, *lists)
        ctx.report, ctx.scale, ctx.is_deterministic = report, scale, deterministic
        ctx.impl = impl
        return out_THC, lse_TH.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THC: Tensor, dloss: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SGC, v_SGC, out_THC, lse_TH, *others = ctx.saved_tensors
        indices_TK, scores_TK, weight_T, keys_BU, masks_BU, counts_B = others
        dheads = attend_backward(
            dout_THC.contiguous(),
            q_THC,
            k_SGC,
            v_SGC,
            out_THC,
            lse_TH,
            keys_BU,
            masks_BU,
            counts_B,
            ctx.scale,
            ctx.is_deterministic,
            ctx.impl,
        )
        dkl_T = dloss * weight_T
        with record_function("sparse_indexer_loss"):
            heads = q_THC, k_SGC, lse_TH
            if ctx.impl == "cuda" and cuda_loss.LOSS == "cuda":
                lists = UnionLists(keys_BU, masks_BU, counts_B)
                kl_TG, dscores_TK = cuda_loss.compare(
                    *heads, lists, scores_TK, dkl_T, scale=ctx.scale
                )
            else:
                kl_TG, dscores_TK = teach_in_parts(
                    *heads, indices_TK, scores_TK, dkl_T, scale=ctx.scale
                )
        ctx.report(kl_TG)
        return (*dheads, dscores_TK, *[None] * 7)


def teach_in_parts(
    q_THC: Tensor,
    k_SGC: Tensor,
    lse_TH: Tensor,
    indices_TK: Tensor,
    scores_TK: Tensor,
    dkl_T: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return kl_TG and dscores_TK for the gradient `dkl_T` of every group's KL, by Triton."""
    num_groups = k_SGC.shape[1]
    dkl_TG = dkl_T.float()[:, None].expand(-1, num_groups).contiguous()
    kl_TG, dscores_TK = torch.empty_like(dkl_TG), torch.empty_like(scores_TK)
    num_rows = rows_of_chunk(num_groups * indices_TK.shape[1] * torch.float32.itemsize)
    rows = q_THC, lse_TH, indices_TK, dkl_TG, scores_TK, kl_TG, dscores_TK
    for q, lse, indices, dkl, scores, kl, dscores in zip(
        *(each.split(num_rows) for each in rows), strict=True
    ):
        target = recover_target(q, k_SGC, lse, indices, scale=scale)
        fill_divergence_and_gradient(dkl, scores, target, kl_TG=kl, dscores_TK=dscores)
    return kl_TG, dscores_TK
