# SPDX-License-Identifier: Apache-2.0
"""Public function of the sparse attention with its indexer's loss: contract, checks and choice.

The loss needs the attention's weights, of which a fast forward pass keeps none. So the target is
gathered again in the backward pass, for a part of the queries at a time: it never exists whole
(4.3 GB at 128K, K = 2048 and four key-value heads), and of the size of queries by selected keys
the selection and the scores alone live between the two passes.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_dtypes,
    check_groups,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.sparse_attention import cuda
from megatron_keye.kernels.sparse_attention_with_loss import reference

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists: those of `sparse_attention`, with the same default."""


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
    deterministic: bool = False,
    kept: KeptOutputs | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `sparse_attention` does, and teach the scores as `sparse_indexer_loss` does.

    The output is differentiable in `q_THC`, `k_SGC` and `v_SGC`, the loss in `scores_TK` alone.

    Args:
        q_THC: See `sparse_attention`, like the next three.
        k_SGC: Keys.
        v_SGC: Values.
        indices_TK: The selection.
        scores_TK: From `selected_indexer_scores`, any float type; -inf marks padding.
        weight_T: Any float type, by which each query's KL enters the loss.
        report: Called once with kl_TG, detached, float32 (float64 for float64 inputs), in nats.
            "eager" calls it in this call, the others in the backward pass where the attention has
            one. Under torch.compile it is called in this call, and the target exists whole.
        scale: Factor of the logits, usually C^-0.5.
        deterministic: See `sparse_attention`.
        kept: See `sparse_attention`.
        impl: One of IMPLEMENTATIONS, or None for the default; see `sparse_attention` and
            `sparse_indexer_loss` for what they take.

    Returns:
        out_THC, type of `q_THC`, and a scalar whose value is 0, since that of the loss is not
        known yet, and whose gradient is that of sum over T and G of weight_T x kl_TG.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.
        RuntimeError: See `sparse_attention`.

    Source: arXiv 2606.10651, sparse attention and the indexer's loss on the selected set.
    """
    tensors = q_THC, k_SGC, v_SGC, indices_TK, scores_TK, weight_T
    if kept is None and torch.compiler.is_dynamo_compiling():
        out_THC, loss, kl_TG = _attend_plainly(*tensors, scale, deterministic, impl)
        report(kl_TG)
        return out_THC, loss
    chosen = _choose(*tensors, scale, impl)
    operands = *tensors[:5], weight_T.detach(), report
    options: dict[str, Any] = {"scale": scale, "deterministic": deterministic}
    options["kept"] = KeptOutputs() if kept is None else kept
    has_backward = torch.is_grad_enabled() and any(each.requires_grad for each in tensors[:3])
    if chosen != "eager" and has_backward:
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.sparse_attention_with_loss.autograd")
        result: tuple[Tensor, Tensor] = autograd.sparse_attention_with_loss(
            *operands, **options, impl=chosen
        )
        return result
    return reference.sparse_attention_with_loss(*operands, **options, impl=chosen)


@composite("sparse_attention_with_loss")
def _attend_plainly(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scores_TK: Tensor,
    weight_T: Tensor,
    scale: float,
    deterministic: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out_THC, loss and kl_TG, one operator after the other.

    A compiled backward pass cannot call Python, so the target is made in the forward pass.
    """
    tensors = q_THC, k_SGC, v_SGC, indices_TK, scores_TK
    divergences = list[Tensor]()
    out_THC, loss = reference.sparse_attention_with_loss(
        *tensors,
        weight_T.detach(),
        divergences.append,
        scale=scale,
        deterministic=deterministic,
        kept=None,
        impl=_choose(*tensors, weight_T, scale, impl),
    )
    return out_THC, loss, divergences[0]


def _choose(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scores_TK: Tensor,
    weight_T: Tensor,
    scale: float,
    impl: str | None,
) -> str:
    """Return the implementation, after checking that the tensors fit."""
    selected = {"indices_TK": indices_TK, "scores_TK": scores_TK, "weight_T": weight_T}
    sizes = check_shapes(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC, **selected)
    check_groups(sizes["H"], sizes["G"])
    check_same_dtype(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    check_dtypes(FLOAT_DTYPES, scores_TK=scores_TK, weight_T=weight_T)
    takes_triton = suits_triton(q_THC, k_SGC, v_SGC, scores_TK)
    takes_cuda = takes_triton and cuda.suits(q_THC, k_SGC, scale)
    operator = "sparse_attention_with_loss"
    return choose_impl(operator, impl, IMPLEMENTATIONS, triton=takes_triton, cuda=takes_cuda)
