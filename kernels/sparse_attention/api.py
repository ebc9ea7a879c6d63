"""Public function of the sparse attention: contract, checks and choice of implementation.

It also hands out the indexer's target, since the attention's own softmax over the selected keys
is that target and would otherwise be computed twice.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from torch import Tensor

from megatron_keye.kernels.arguments import (
    INDEX_DTYPES,
    check_dtypes,
    check_groups,
    check_same_dtype,
    check_shapes,
    choose_impl,
)
from megatron_keye.kernels.sparse_attention import reference

IMPLEMENTATIONS = ("eager",)
"""What exists; the first is the default."""


def sparse_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with every head of a query to the keys selected for that query.

    Query head h uses key-value head h // (H / G). The output is differentiable in `q_THC`,
    `k_SGC` and `v_SGC`; the target is not. A query without any key gives 0 and gradients of 0.

    Args:
        q_THC: Queries, any float type; H a multiple of G.
        k_SGC: Keys, type of `q_THC`.
        v_SGC: Values, type of `q_THC`.
        indices_TK: int32 or int64, selected keys in any order, each counted as often as it
            stands there; -1, like every entry outside 0 <= index < S, is padding and loads
            neither key nor value. Causality and documents are the selection's business.
        scale: Factor of the logits, usually C^-0.5.
        impl: One of IMPLEMENTATIONS, or None for the first.

    Returns:
        out_THC, type of `q_THC`, and target_TGK, float32 (float64 for float64 inputs): the mean
        over the H / G heads of a group of each head's softmax over the selected keys. It sums
        to 1 over K and is 0 where the entry is padding.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.

    Source: arXiv 2606.10651, sparse attention and the indexer's target on the selected set.
    """
    choose_impl("sparse_attention", impl, IMPLEMENTATIONS)
    sizes = check_shapes(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC, indices_TK=indices_TK)
    check_groups(sizes["H"], sizes["G"])
    check_same_dtype(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    return reference.sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=scale)
