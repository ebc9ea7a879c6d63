# SPDX-License-Identifier: Apache-2.0
"""Public function of the warm-up's indexer loss: contract, checks and choice of implementation.

Before the indexer selects anything, it learns from all keys of each query's range.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_groups,
    check_key_ranges,
    check_key_reach,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.dense_indexer_loss import reference
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere."""


@composite("dense_indexer_loss")
def dense_indexer_loss(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    weight_T: Tensor,
    attention_lse_TH: Tensor | None = None,
    *,
    scale: float,
    key_reach_S: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a weighted sum of KL(dense attention of a group || softmax of the indexer's scores).

    Both are over the keys that a query sees. The attention is the mean of the softmax of the
    group's H / G heads; `query_THC` and `key_SGC` get no gradient. The sum is differentiable in
    `q_TIJ`, `k_SJ` and `gate_TI`, with memory linear in the row's length. All inputs must be
    finite. A query with an empty range has loss 0.

    The weights are an argument because "triton" makes the gradients in the forward pass: both
    need the same products, and those of keys add up over weighted queries.

    Args:
        q_TIJ: Indexer queries, any float type.
        k_SJ: The one key that all indexer heads share, type of `q_TIJ`.
        gate_TI: Weight of each indexer head, any float type, any sign.
        query_THC: Attention queries, any float type; H a multiple of G.
        key_SGC: Attention keys, type of `query_THC`.
        key_start_T: int64, first key that a query may see, at least 0.
        key_end_T: int64, one past the last key that it may see, at most S; at or below
            `key_start_T` for a query without any key.
        weight_T: What a query's divergences weigh in the sum, any float type, finite.
        attention_lse_TH: From `dense_attention_with_lse` of the same queries, keys, ranges and
            scale; saves "triton" a pass over all their logits ("eager" does without).
        scale: Factor of the attention's logits, usually C^-0.5.
        key_reach_S: int64, for documents that branch: a query sees a key of its range only where
            `key_end_T` is at most this. None: it sees all of them.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" takes heads of up to
            256 channels and is deterministic, gradients included.

    Returns:
        The sum over queries and groups, a scalar, and kl_TG without a gradient and unweighted;
        float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.

    Source: arXiv 2606.10651, dense warm-up of the indexer.
    """
    takes_triton = suits_triton(q_TIJ, k_SJ, gate_TI, query_THC, key_SGC)
    chosen = choose_impl("dense_indexer_loss", impl, IMPLEMENTATIONS, triton=takes_triton)
    sizes = check_shapes(
        q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI, query_THC=query_THC, key_SGC=key_SGC
    )
    check_groups(sizes["H"], sizes["G"])
    check_same_dtype(q_TIJ=q_TIJ, k_SJ=k_SJ)
    check_same_dtype(query_THC=query_THC, key_SGC=key_SGC)
    check_dtypes(FLOAT_DTYPES, gate_TI=gate_TI)
    check_key_ranges(q_TIJ, key_start_T, key_end_T)
    check_key_reach(k_SJ, key_reach_S)
    check_shapes(q_TIJ=q_TIJ, weight_T=weight_T)
    check_dtypes(FLOAT_DTYPES, weight_T=weight_T)
    if attention_lse_TH is not None:
        check_shapes(query_THC=query_THC, attention_lse_TH=attention_lse_TH)
        check_dtypes(FLOAT_DTYPES[:2], attention_lse_TH=attention_lse_TH)
    inputs = q_TIJ, k_SJ, gate_TI, query_THC, key_SGC, key_start_T, key_end_T
    if chosen == "triton":
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.dense_indexer_loss.autograd")
        loss, kl_TG = autograd.dense_indexer_loss(
            (*inputs, key_reach_S), weight_T, attention_lse_TH, scale=scale
        )
        return loss, kl_TG
    return reference.dense_indexer_loss(*inputs, weight_T, key_reach_S, scale=scale)
