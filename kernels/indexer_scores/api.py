# SPDX-License-Identifier: Apache-2.0
"""Public function of the indexer's scores: contract, checks and choice of implementation.

They feed the selection.

Shape letters: T queries, S keys, I indexer heads, J indexer channels.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_key_ranges,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.indexer_scores import reference
from megatron_keye.kernels.registration import composite, opaque

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere."""


@composite("indexer_scores")
def indexer_scores(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Score every key of each query's range: J^-0.5 * sum over i of gate * relu(q . k).

    Differentiable in `q_TIJ`, `k_SJ` and `gate_TI`. All inputs must be finite, keys outside
    every range included.

    Args:
        q_TIJ: Indexer queries, any float type.
        k_SJ: The one key that all indexer heads share, type of `q_TIJ`.
        gate_TI: Weight of each head, any float type, any sign.
        key_start_T: int64, first key that a query may see, at least 0.
        key_end_T: int64, one past the last key that it may see, at most S; at or below
            `key_start_T` for a query without any key.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" has no backward here, and
            is the default only where none is asked for; it takes up to 256 channels.

    Returns:
        scores_TS, float32 (float64 for float64 inputs): -inf outside the range.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.

    Source: arXiv 2606.10651, lightning indexer; no I^-0.5 factor, as in the released code.
    """
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (q_TIJ, k_SJ, gate_TI)
    )
    takes_triton = not needs_gradient and suits_triton(q_TIJ, k_SJ, gate_TI)
    chosen = choose_impl("indexer_scores", impl, IMPLEMENTATIONS, triton=takes_triton)
    check_shapes(q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI)
    check_same_dtype(q_TIJ=q_TIJ, k_SJ=k_SJ)
    check_dtypes(FLOAT_DTYPES, gate_TI=gate_TI)
    check_key_ranges(q_TIJ, key_start_T, key_end_T)
    if chosen == "triton":
        if needs_gradient:
            raise ValueError(
                "indexer_scores: impl 'triton' got inputs that require gradients, expected "
                "none; take impl='eager', or selected_indexer_scores"
            )
        return _score_in_triton(q_TIJ, k_SJ, gate_TI, key_start_T, key_end_T)
    return reference.indexer_scores(q_TIJ, k_SJ, gate_TI, key_start_T, key_end_T)


def _fake_score(q_TIJ: Tensor, k_SJ: Tensor, *_: object) -> Tensor:
    return q_TIJ.new_empty((q_TIJ.shape[0], k_SJ.shape[0]), dtype=torch.float32)


@opaque("indexer_scores_in_triton", _fake_score)
def _score_in_triton(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, key_start_T: Tensor, key_end_T: Tensor
) -> Tensor:
    # Loaded on demand: everything else must import where Triton cannot compile.
    triton = import_module("megatron_keye.kernels.indexer_scores.triton")
    scores_TS: Tensor = triton.indexer_scores(q_TIJ, k_SJ, gate_TI, key_start_T, key_end_T)
    return scores_TS
