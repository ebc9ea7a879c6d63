# SPDX-License-Identifier: Apache-2.0
"""Ties the scores of a selection into autograd.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.registration import fake_gradients, opaque
from megatron_keye.kernels.selected_indexer_scores import cuda, triton
from megatron_keye.kernels.union_lists import UnionLists, union_lists


def selected_indexer_scores(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor, *, impl: str
) -> Tensor:
    """Return scores_TK; see api.selected_indexer_scores."""
    if impl == "cuda":
        cuda.check_call(q_TIJ, k_SJ)
    scores_TK: Tensor = _SelectedScores.apply(q_TIJ, k_SJ, gate_TI, indices_TK, impl)
    return scores_TK


def _fake_score(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor) -> Tensor:
    return q_TIJ.new_empty(indices_TK.shape, dtype=torch.float32)


@opaque("score_selected", _fake_score)
def _score(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor) -> Tensor:
    return triton.score_selected(q_TIJ, k_SJ, gate_TI, indices_TK)


@opaque("score_selected_backward", fake_gradients)
def _score_backward(
    dscores_TK: Tensor,
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    keys_BU: Tensor,
    masks_BU: Tensor,
    counts_B: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = UnionLists(keys_BU, masks_BU, counts_B)
    if impl == "cuda":
        return cuda.score_selected_backward(dscores_TK, q_TIJ, k_SJ, gate_TI, lists)
    return triton.score_selected_backward(dscores_TK, q_TIJ, k_SJ, gate_TI, lists)


class _SelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor, impl: str
    ) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(q_TIJ, k_SJ, gate_TI, indices_TK)
        return _score(q_TIJ, k_SJ, gate_TI, indices_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores_TK: Tensor) -> tuple[Tensor | None, ...]:
        q_TIJ, k_SJ, gate_TI, indices_TK = ctx.saved_tensors
        lists = union_lists(indices_TK, k_SJ.shape[0], impl="triton")
        dscores_TK = dscores_TK.contiguous()
        gradients = _score_backward(dscores_TK, q_TIJ, k_SJ, gate_TI, *lists, ctx.impl)
        return (*gradients, None, None)
