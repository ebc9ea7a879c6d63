# SPDX-License-Identifier: Apache-2.0
"""One small call of every public operator, for what holds of all of them.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads, G key-value
heads, C channels of a head, K selected keys.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.kernels.dense_attention import dense_attention, dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.drawn_normal import fill_normal
from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.indexer_quantization import (
    dequantize,
    quantize,
    round_to_fp8,
    split_rounded,
)
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.rotary import rotate
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_fp8 import sparse_attention_fp8
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.kernels.sparse_decode import PagedCache, sparse_decode
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss
from megatron_keye.kernels.union_lists import union_lists
from tests.support.numerics import document_ranges, make_tensor, odd_selection

LENGTH = 12
SCALE = 0.3


class OperatorCase(NamedTuple):
    """A call, and what it is given."""

    call: Callable[..., tuple[Tensor, ...]]
    """Takes the inputs and `impl`."""
    inputs: tuple[Tensor, ...]
    num_differentiable: int = 0
    """How many of the inputs, from the first on, get gradients."""


def operator_cases(device: str, dtype: torch.dtype) -> dict[str, OperatorCase]:
    """Return the cases by the operator's name.

    Args:
        device: Where inputs lie.
        dtype: Of what is of any float type.
    """
    num_channels = 16
    shapes = [(4, 16), (16,), (4,), (2, num_channels), (1, num_channels), (1, num_channels)]
    q, k, gate, query, key, value = (
        make_tensor(LENGTH, *shape, seed=seed, dtype=dtype).to(device)
        for seed, shape in enumerate(shapes)
    )
    start_T, end_T = (each.to(device) for each in document_ranges(4, LENGTH - 4))
    ranges = start_T, end_T
    indices_TK = odd_selection(LENGTH, LENGTH, 5, seed=7).to(device)
    is_real_TK = indices_TK >= 0
    scores_TK = make_tensor(LENGTH, 5, seed=8, dtype=torch.float32).to(device)
    scores_TK = scores_TK.masked_fill(~is_real_TK, -torch.inf)
    target_TGK = (is_real_TK / is_real_TK.sum(1, keepdim=True).clamp(min=1))[:, None]
    weight_T = torch.linspace(0.5, 1.5, LENGTH, device=device)
    pages_BN = torch.tensor([[1, 0], [2, -1]], dtype=torch.int32, device=device)
    lengths_B = torch.tensor([7, 3], device=device)
    paged = (each.view(3, 4, *each.shape[1:]) for each in (key, value, k))
    decoded = q[:4].view(2, 2, 4, 16), gate[:4].view(2, 2, 4), query[:4].view(2, 2, 2, -1)
    angle_TC = make_tensor(LENGTH, num_channels, seed=9, dtype=torch.float32).to(device)
    heads, indexer, teacher = (query, key, value), (q, k, gate), (query, key)
    cache = (*paged, pages_BN, lengths_B)
    selected = (*indexer, indices_TK)
    vectors, rounded = k.float(), quantize_heads(value)
    return {
        "rotate": OperatorCase(_rotate, (query, angle_TC), 1),
        "quantize": OperatorCase(quantize, (vectors,)),
        "split_rounded": OperatorCase(split_rounded, (round_to_fp8(vectors),)),
        "dequantize": OperatorCase(_dequantize, quantize(vectors)),
        "round_to_fp8": OperatorCase(_single(round_to_fp8), (vectors,), 1),
        "indexer_scores": OperatorCase(_single(indexer_scores), (*indexer, *ranges)),
        "select_top_k": OperatorCase(_single(_select), (angle_TC[:, :LENGTH], *ranges)),
        "lightning_indexer": OperatorCase(_single(_index), (*indexer, *ranges)),
        "selected_indexer_scores": OperatorCase(_single(selected_indexer_scores), selected, 3),
        "union_lists": OperatorCase(_merge, (indices_TK,)),
        "sparse_attention": OperatorCase(_attend, (*heads, indices_TK), 3),
        "quantize_heads": OperatorCase(quantize_heads, (value,)),
        "dequantize_heads": OperatorCase(_dequantize_heads, rounded),
        "sparse_attention_fp8": OperatorCase(
            _single(partial(sparse_attention_fp8, scale=SCALE)),
            (query, *quantize_heads(key), *rounded, indices_TK),
        ),
        "sparse_indexer_loss": OperatorCase(
            _single(sparse_indexer_loss), (scores_TK, target_TGK), 1
        ),
        "sparse_attention_with_loss": OperatorCase(
            _attend_with_loss, (scores_TK, *heads, indices_TK, weight_T), 4
        ),
        "sparse_decode": OperatorCase(_decode, (*decoded, *cache)),
        "dense_attention": OperatorCase(
            _single(partial(dense_attention, scale=SCALE)), (*heads, *ranges), 3
        ),
        "dense_attention_with_lse": OperatorCase(
            partial(dense_attention_with_lse, scale=SCALE), (*heads, *ranges), 3
        ),
        "dense_indexer_loss": OperatorCase(
            partial(dense_indexer_loss, scale=SCALE), (*indexer, *teacher, *ranges, weight_T), 3
        ),
        "fill_normal": OperatorCase(_fill, (query,)),
    }


def _single(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def call(*inputs: Tensor, impl: str | None) -> tuple[Tensor, ...]:
        return (function(*inputs, impl=impl),)

    return call


def _rotate(x_THC: Tensor, angle_TC: Tensor, *, impl: str | None) -> tuple[Tensor, ...]:
    return (rotate(x_THC, angle_TC.cos(), angle_TC.sin(), impl=impl),)


def _dequantize(values: Tensor, scales: Tensor, *, impl: str | None) -> tuple[Tensor, ...]:
    return (dequantize(values, scales, torch.float32),)


def _dequantize_heads(values: Tensor, scales: Tensor, *, impl: str | None) -> tuple[Tensor, ...]:
    return (dequantize_heads(values, scales, torch.float32, impl=impl),)


def _select(scores_TS: Tensor, *ranges: Tensor, impl: str | None) -> Tensor:
    return select_top_k(scores_TS, ranges[0], ranges[1], 5, impl=impl)


def _index(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, *ranges: Tensor, impl: str | None
) -> Tensor:
    return lightning_indexer(q_TIJ, k_SJ, gate_TI, ranges[0], ranges[1], 5, impl=impl)


def _merge(indices_TK: Tensor, *, impl: str | None) -> tuple[Tensor, ...]:
    lists = union_lists(indices_TK, LENGTH, impl=impl)
    place_U = torch.arange(lists.keys_BU.shape[1], device=indices_TK.device)
    is_specified_BU = place_U < lists.counts_B[:, None]
    return tuple(each * is_specified_BU for each in lists[:2]) + (lists.counts_B,)


def _attend(*operands: Tensor, impl: str | None) -> tuple[Tensor, ...]:
    q_THC, k_SGC, v_SGC, indices_TK = operands
    return sparse_attention(
        q_THC, k_SGC, v_SGC, indices_TK, scale=SCALE, deterministic=impl == "triton", impl=impl
    )


def _attend_with_loss(
    scores_TK: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    weight_T: Tensor,
    *,
    impl: str | None,
) -> tuple[Tensor, ...]:
    return sparse_attention_with_loss(
        q_THC,
        k_SGC,
        v_SGC,
        indices_TK,
        scores_TK,
        weight_T,
        lambda kl_TG: None,  # called in either pass
        scale=SCALE,
        impl=impl,
    )


def _decode(*operands: Tensor, impl: str | None) -> tuple[Tensor, ...]:
    q_BTIJ, gate_BTI, query_BTHC, *cache = operands
    return sparse_decode(
        q_BTIJ, gate_BTI, query_BTHC, PagedCache(*cache), 5, scale=SCALE, impl=impl
    )


def _fill(part: Tensor, *, impl: str | None) -> tuple[Tensor, ...]:
    filled = torch.empty_like(part)
    fill_normal(filled, "a weight", std=0.02)
    return (filled,)
