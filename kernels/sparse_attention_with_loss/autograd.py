"""Attention and loss as one node of autograd, whose backward pass in Triton gives the target.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.sparse_attention.triton import attend, lay_out_heads
from megatron_keye.kernels.sparse_attention.triton_backward import attend_backward
from megatron_keye.kernels.sparse_indexer_loss.triton import divergence_with_gradient
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
) -> tuple[Tensor, Tensor]:
    """Return out_THC and loss; see api.sparse_attention_with_loss."""
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
    ) -> tuple[Tensor, Tensor]:
        heads = lay_out_heads(q_THC, k_SGC, v_SGC)
        lists = union_lists(indices_TK, k_SGC.shape[0], impl="triton")
        out_THC, lse_TH = kept.outputs_of(
            "sparse_attention", lambda: attend(*heads, lists, scale=scale)
        )
        ctx.save_for_backward(*heads, out_THC, lse_TH, scores_TK.contiguous(), weight_T, *lists)
        ctx.report, ctx.scale, ctx.is_deterministic = report, scale, deterministic
        return out_THC, lse_TH.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THC: Tensor, dloss: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SGC, v_SGC, out_THC, lse_TH, scores_TK, weight_T, *lists = ctx.saved_tensors
        *dheads, target_TGK = attend_backward(
            dout_THC.contiguous(),
            q_THC,
            k_SGC,
            v_SGC,
            out_THC,
            lse_TH,
            UnionLists(*lists),
            scale=ctx.scale,
            is_deterministic=ctx.is_deterministic,
            num_selected=scores_TK.shape[1],
        )
        dkl_T1 = (dloss * weight_T).float()[:, None]
        dkl_TG = dkl_T1.expand(-1, k_SGC.shape[1]).contiguous()
        kl_TG, dscores_TK = divergence_with_gradient(dkl_TG, scores_TK, target_TGK)
        ctx.report(kl_TG)
        return (*dheads, dscores_TK, None, None, None, None, None, None)
