# SPDX-License-Identifier: Apache-2.0
"""Binding of the indexer's loss in CUDA: target, divergence and gradient in one pass.

The device code is csrc/sparse_attention/loss_sm90a.cu. It walks over the attention's unions, so
that a key is gathered once for 16 queries, and compares weights with scores where it computes
them: the target never leaves a multiprocessor.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_keye.kernels.extension import check_built, register
from megatron_keye.kernels.sparse_attention.cuda import at_vectors
from megatron_keye.kernels.sparse_indexer_loss.triton import scores_part
from megatron_keye.kernels.union_lists import UnionLists

LOSS: Literal["triton", "cuda"] = "triton"
"""How impl "cuda" makes the loss: by Triton's target and divergence, or by the extension's pass.
The pass is faster for unions of up to five times the selection (docs/benchmarks/README.md), which
only the GPU knows: tests and benchmarks alone set this, until the choice follows the union."""
_NAME = "sparse_attention_loss"


def _fake_sparse_attention_loss(
    q_THC: Tensor, k_SGC: Tensor, lse_TH: Tensor, *_: object
) -> Tensor:
    """Shape and dtype of the result, for tracing."""
    return lse_TH.new_empty((q_THC.shape[0], k_SGC.shape[1]))


register(_NAME, _fake_sparse_attention_loss)


def compare(
    q_THC: Tensor,
    k_SGC: Tensor,
    lse_TH: Tensor,
    lists: UnionLists,
    scores_TK: Tensor,
    dkl_T: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return kl_TG, and dscores_TK in the type of `scores_TK`; the same bits at every call.

    Args:
        q_THC: Queries, as the CUDA attention takes them.
        k_SGC: Keys, likewise.
        lse_TH: From the attention's forward pass.
        lists: Unions of the selections.
        scores_TK: Contiguous; -inf marks padding alone.
        dkl_T: Gradient of each query's KL, the same for every group.
        scale: Factor of the logits, above 0.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: More selected keys than a program of the scores' softmax takes.
    """
    check_built(_NAME)
    (q_THC,), (k_SGC,) = at_vectors(q_THC), at_vectors(k_SGC)
    dkl_T = dkl_T.float().contiguous()
    score_lse_T, dscores_TK = scores_part(dkl_T, scores_TK, k_SGC.shape[1])
    kl_TG: Tensor = torch.ops.megatron_keye.sparse_attention_loss(
        q_THC, k_SGC, lse_TH, *lists, scores_TK.float(), score_lse_T, dkl_T, dscores_TK, scale
    )
    return kl_TG, dscores_TK.to(scores_TK.dtype)
