# SPDX-License-Identifier: Apache-2.0
"""Public function of the scores of selected keys: contract, checks, choice of implementation.

They give the indexer's loss its gradient without a score matrix of queries by keys.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_dtypes,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.ranges import named
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.selected_indexer_scores import cuda, reference

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists; "cuda", whose backward pass is the extension's, is the default where it takes a
call, "triton" elsewhere on a GPU in the types that it takes, "eager" otherwise."""


@composite("selected_indexer_scores")
def selected_indexer_scores(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    indices_TK: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Score the selected keys of each query, by the formula of `indexer_scores`.

    Differentiable in `q_TIJ`, `k_SJ` and `gate_TI`; padded entries give gradients of exactly 0.

    Args:
        q_TIJ: Indexer queries, any float type.
        k_SJ: The one key that all indexer heads share, type of `q_TIJ`.
        gate_TI: Weight of each head, any float type, any sign.
        indices_TK: int32 or int64, selected keys in any order; -1, like every entry outside
            0 <= index < S, is padding and loads no key. The backward of "triton" and "cuda" takes
            rows only as `select_top_k` gives them: ascending, distinct, padded last.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" takes up to 64 heads of
            up to 128 channels, and sums the keys' gradient in no fixed order. So does "cuda",
            which takes 16 heads of 64 channels in bfloat16, on a GPU of compute capability 9.0.

    Returns:
        scores_TK, float32 (float64 for float64 inputs): -inf where the entry is padding.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.
        RuntimeError: "cuda" is asked for and its extension is not built.

    Source: arXiv 2606.10651, lightning indexer.
    """
    takes_triton = suits_triton(q_TIJ, k_SJ, gate_TI)
    takes_cuda = takes_triton and cuda.suits(q_TIJ, k_SJ)
    chosen = choose_impl(
        "selected_indexer_scores", impl, IMPLEMENTATIONS, triton=takes_triton, cuda=takes_cuda
    )
    check_shapes(q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI, indices_TK=indices_TK)
    check_same_dtype(q_TIJ=q_TIJ, k_SJ=k_SJ)
    check_dtypes(FLOAT_DTYPES, gate_TI=gate_TI)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    with named("selected_indexer_scores"):
        if chosen == "eager":
            return reference.selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK)
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.selected_indexer_scores.autograd")
        scores_TK: Tensor = autograd.selected_indexer_scores(
            q_TIJ, k_SJ, gate_TI, indices_TK, impl=chosen
        )
        return scores_TK
