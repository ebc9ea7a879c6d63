# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss of the sparse phase in Triton: one program per query, value and gradient.

Shape letters: T queries, G key-value heads, K selected keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import check_triton, padded

_MAX_SELECTED = 16384


def divergence(scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    """Return kl_TG; see api.sparse_indexer_loss.

    Args:
        scores_TK: Contiguous.
        target_TGK: Contiguous; read where the scores are not -inf.

    Raises:
        ValueError: More selected keys than fit a program, or types that it does not take.
    """
    kl_TG = scores_TK.new_empty(target_TGK.shape[:2], dtype=torch.float32)
    _launch(None, scores_TK, target_TGK, kl_TG, None)
    return kl_TG


def divergence_backward(dkl_TG: Tensor, scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    """Return dscores_TK in the type of `scores_TK`: sum over groups of softmax - target.

    Args:
        dkl_TG: Gradient of the loss, contiguous.
        scores_TK: As in `divergence`.
        target_TGK: As in `divergence`.
    """
    dscores_TK = torch.empty_like(scores_TK)
    _launch(dkl_TG, scores_TK, target_TGK, None, dscores_TK)
    return dscores_TK


def fill_divergence_and_gradient(
    dkl_TG: Tensor,
    scores_TK: Tensor,
    target_TGK: Tensor,
    *,
    kl_TG: Tensor,
    dscores_TK: Tensor,
) -> None:
    """Fill what `divergence` and `divergence_backward` return, from one read of the target.

    Args:
        dkl_TG: As in `divergence_backward`.
        scores_TK: As in `divergence`.
        target_TGK: As in `divergence`.
        kl_TG: To be filled; float32, contiguous.
        dscores_TK: To be filled; type of `scores_TK`, contiguous.
    """
    _launch(dkl_TG, scores_TK, target_TGK, kl_TG, dscores_TK)


def scores_part(dkl_T: Tensor, scores_TK: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return what the scores alone give, for a pass that adds what the target gives.

    Args:
        dkl_T: Gradient of the loss of every group; float32, contiguous.
        scores_TK: As in `divergence`.
        num_groups: G, each with a target that sums to 1.

    Returns:
        lse_T, float32 log2 of the sum of exponentials of each query's scores, 0 without any key;
        and dscores_TK, float32: G times dkl_T times their softmax, 0 at padding.

    Raises:
        ValueError: See `divergence`.
    """
    num_queries, num_selected = scores_TK.shape
    _check(num_selected, scores_TK=scores_TK)
    lse_T, dscores_TK = torch.empty_like(dkl_T), torch.empty_like(scores_TK, dtype=torch.float32)
    if num_queries > 0:
        _softmax_kernel[(num_queries,)](
            dkl_T,
            scores_TK,
            lse_T,
            dscores_TK,
            num_selected,
            LOG2_E=math.log2(math.e),
            GROUPS=num_groups,
            BLOCK_K=padded(num_selected),
            num_warps=4,
        )
    return lse_T, dscores_TK


def _check(num_selected: int, **tensors: Tensor) -> None:
    """Raise unless a program takes a row of so many selected keys, in the types of `tensors`."""
    check_triton("sparse_indexer_loss", tensors["scores_TK"], **tensors)
    if num_selected > _MAX_SELECTED:
        raise ValueError(
            f"scores_TK: got K = {num_selected}, expected at most {_MAX_SELECTED} with impl "
            "'triton'; take impl='eager'"
        )


def _launch(
    dkl_TG: Tensor | None,
    scores_TK: Tensor,
    target_TGK: Tensor,
    kl_TG: Tensor | None,
    dscores_TK: Tensor | None,
) -> None:
    """Fill what is given of `kl_TG` and `dscores_TK`."""
    num_queries, num_groups, num_selected = target_TGK.shape
    _check(num_selected, scores_TK=scores_TK, target_TGK=target_TGK)
    if num_queries > 0:
        _divergence_kernel[(num_queries,)](
            scores_TK if dkl_TG is None else dkl_TG,  # not read without a gradient
            scores_TK,
            target_TGK,
            scores_TK if kl_TG is None else kl_TG,
            scores_TK if dscores_TK is None else dscores_TK,
            num_selected,
            GROUPS=num_groups,
            BLOCK_K=padded(num_selected),
            WITH_VALUE=kl_TG is not None,
            WITH_GRADIENT=dscores_TK is not None,
            num_warps=4,
        )


@triton.jit
def _load_scores(
    scores: tl.tensor, query: tl.tensor, num_selected: tl.tensor, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Return a row's places, which are real, its scores less the largest, log(l_i), the largest.

    The largest is 0 in a row without any key.
    """
    place = tl.arange(0, BLOCK_K)
    row = scores + query * num_selected
    score = tl.load(row + place, place < num_selected, other=-float("inf")).to(tl.float32)
    is_real = score > -float("inf")
    m_i = tl.max(score, 0)
    m_i = tl.where(m_i > -float("inf"), m_i, 0.0)
    score = tl.where(is_real, score - m_i, -float("inf"))
    l_i = tl.sum(tl.exp(score), 0)
    return place, is_real, score, tl.log(tl.where(l_i > 0, l_i, 1.0)), m_i


@triton.jit
def _softmax_kernel(
    dkl: tl.tensor,
    scores: tl.tensor,
    lse: tl.tensor,
    dscores: tl.tensor,
    num_selected: int,
    LOG2_E: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    query = tl.program_id(0).to(tl.int64)
    place, _, score, log_l, m_i = _load_scores(scores, query, num_selected, BLOCK_K)
    tl.store(lse + query, (m_i + log_l) * LOG2_E)
    dscore = GROUPS * tl.load(dkl + query) * tl.exp(score - log_l)
    tl.store(dscores + query * num_selected + place, dscore, place < num_selected)


@triton.jit
def _divergence_kernel(
    dkl: tl.tensor,
    scores: tl.tensor,
    target: tl.tensor,
    kl: tl.tensor,
    dscores: tl.tensor,
    num_selected: int,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
) -> None:
    query = tl.program_id(0).to(tl.int64)
    place, is_real, score, log_l, _ = _load_scores(scores, query, num_selected, BLOCK_K)
    weight = tl.exp(score - log_l)
    dscore = tl.zeros([BLOCK_K], tl.float32)
    for group in range(GROUPS):
        row = target + (query * GROUPS + group) * num_selected
        wanted = tl.load(row + place, is_real, other=0.0).to(tl.float32)
        if WITH_VALUE:
            log_wanted = tl.log(tl.where(wanted > 0, wanted, 1.0))
            terms = tl.where(wanted > 0, wanted * (log_wanted - score + log_l), 0.0)
            tl.store(kl + query * GROUPS + group, tl.sum(terms, 0))
        if WITH_GRADIENT:
            factor = tl.load(dkl + query * GROUPS + group).to(tl.float32)
            dscore += factor * (weight * tl.sum(wanted, 0) - wanted)
    if WITH_GRADIENT:
        row = dscores + query * num_selected
        tl.store(row + place, dscore.to(dscores.dtype.element_ty), place < num_selected)
