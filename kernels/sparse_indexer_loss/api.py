# SPDX-License-Identifier: Apache-2.0
"""Public function of the sparse phase's indexer loss: contract, checks, choice of implementation.

Shape letters: T queries, G key-value heads, K selected keys.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.sparse_indexer_loss import reference

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere."""


@composite("sparse_indexer_loss")
def sparse_indexer_loss(
    scores_TK: Tensor, target_TGK: Tensor, *, impl: str | None = None
) -> Tensor:
    """Return KL(target || softmax of the scores over the selected keys).

    Differentiable in `scores_TK` only; the gradient of one group is softmax - target, and exactly
    0 at padding. A query without any key has loss 0.

    Args:
        scores_TK: From `selected_indexer_scores`, any float type; -inf marks padding.
        target_TGK: From `sparse_attention`, any float type: sums to 1 over K, 0 at padding.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" takes K up to 16384.

    Returns:
        kl_TG, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.

    Source: arXiv 2606.10651, indexer loss of the sparse phase: target normalised on the set.
    """
    takes_triton = suits_triton(scores_TK, target_TGK)
    chosen = choose_impl("sparse_indexer_loss", impl, IMPLEMENTATIONS, triton=takes_triton)
    check_shapes(scores_TK=scores_TK, target_TGK=target_TGK)
    check_dtypes(FLOAT_DTYPES, scores_TK=scores_TK, target_TGK=target_TGK)
    if chosen == "triton":
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.sparse_indexer_loss.autograd")
        kl_TG: Tensor = autograd.sparse_indexer_loss(scores_TK, target_TGK)
        return kl_TG
    return reference.sparse_indexer_loss(scores_TK, target_TGK)
