# SPDX-License-Identifier: Apache-2.0
"""Public function of the dense attention: contract, checks and choice of implementation.

The warm-up phase trains the indexer beside dense attention, and short rows need no selection;
both must mean exactly what the sparse attention means when it selects everything.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    check_groups,
    check_key_ranges,
    check_key_reach,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.dense_attention import reference, sdpa, traced
from megatron_keye.kernels.implementations import choose_impl
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.trapezoids import find_trapezoids

IMPLEMENTATIONS = ("eager", "sdpa")
"""What exists; "sdpa" is the default on a GPU in 16 bits, "eager" otherwise."""


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Return the output alone of `dense_attention_with_lse`, which says all about both."""
    return dense_attention_with_lse(
        q_THC, k_SGC, v_SGC, key_start_T, key_end_T, scale=scale, impl=impl
    )[0]


def dense_attention_with_lse(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    *,
    scale: float,
    key_reach_S: Tensor | None = None,
    kept: KeptOutputs | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with every head of a query to all keys of that query's range.

    Query head h uses key-value head h // (H / G). Differentiable in `q_THC`, `k_SGC` and
    `v_SGC`, all of which must be finite. A query with an empty range gives 0 and gradients of 0.

    Args:
        q_THC: Queries, any float type; H a multiple of G.
        k_SGC: Keys, type of `q_THC`.
        v_SGC: Values, type of `q_THC`.
        key_start_T: int64, first key that a query may see, at least 0.
        key_end_T: int64, one past the last key that it may see, at most S; at or below
            `key_start_T` for a query without any key.
        scale: Factor of the logits, usually C^-0.5.
        key_reach_S: int64, for documents that branch: a query sees a key of its range only where
            `key_end_T` is at most this. None: it sees all of them.
        kept: Keeps what the backward pass needs for a second call with the same tensors, which
            then takes it from there; "eager" computes it again. None: nothing is kept, and
            torch.compile takes the operator as one.
        impl: One of IMPLEMENTATIONS, or None for the default. "sdpa" is torch's own attention,
            cuDNN's or FlashAttention, two calls for each trapezoid of the mask and one more for
            each gap in it; on a GPU it takes 16 bits and heads of a multiple of 8 channels, and
            sums gradients in its own order. To find the trapezoids, ranges and reach are read back
            to the host once.

    Returns:
        out_THC, type of `q_THC`, and lse_TH without a gradient, float32 (float64 for float64
        inputs): natural logarithm of each head's sum of exponentials of the scaled logits, +inf
        for a query with an empty range, so that exp(logit - lse) is its weight everywhere. In 16
        bits "sdpa" gives it to about 1e-4.

    Raises:
        ValueError: On shapes, types or devices that do not fit, inputs that "sdpa" does not
            take, or an unknown `impl`.
    """
    operands = q_THC, k_SGC, v_SGC, key_start_T, key_end_T, key_reach_S, scale, impl
    if kept is None and torch.compiler.is_dynamo_compiling():
        return _attend_at_once(*operands)
    ranges = key_start_T, key_end_T, key_reach_S
    if _choose(*operands) == "eager":
        return reference.dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=scale)
    trapezoids = find_trapezoids(*ranges)
    return sdpa.dense_attention(q_THC, k_SGC, v_SGC, trapezoids, scale=scale, kept=kept)


@composite("dense_attention")
def _attend_at_once(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    scale: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH without knowing the ranges, as a trace does."""
    ranges = key_start_T, key_end_T, key_reach_S
    if _choose(q_THC, k_SGC, v_SGC, *ranges, scale, impl) == "eager":
        return reference.dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=scale)
    return traced.dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=scale)


def _choose(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    scale: float,
    impl: str | None,
) -> str:
    """Return the implementation, after checking that it takes the tensors."""
    sizes = check_shapes(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    check_groups(sizes["H"], sizes["G"])
    check_same_dtype(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    check_key_ranges(q_THC, key_start_T, key_end_T)
    check_key_reach(k_SGC, key_reach_S)
    takes_sdpa = sdpa.takes(q_THC, k_SGC, v_SGC)
    # On a GPU no operator takes 32 bits, which only tests train in; 16 bits are refused below
    # rather than attended to slowly.
    suits_sdpa = q_THC.is_cuda and (takes_sdpa or q_THC.element_size() <= 2)
    chosen = choose_impl("dense_attention", impl, IMPLEMENTATIONS, sdpa=suits_sdpa)
    if chosen == "sdpa" and not takes_sdpa:
        raise ValueError(
            f"q_THC: got {q_THC.dtype} with C = {q_THC.shape[2]}, which neither cuDNN nor "
            "FlashAttention takes here; take impl='eager'"
        )
    return chosen
