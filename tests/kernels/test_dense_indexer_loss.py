# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's loss over whole ranges; Triton's form has its own file."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from tests.support.numerics import (
    assert_close,
    document_ranges,
    loop_attention,
    loop_divergence,
    loop_scores,
    make_tensor,
    odd_ranges,
    ranges_listed,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_GROUPS, NUM_HEADS, NUM_CHANNELS = 63, 100, 2, 6, 10
SCALE = 0.3


def make_indexer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    return (
        make_tensor(NUM_QUERIES, 3, 12, seed=1, dtype=dtype),
        make_tensor(NUM_KEYS, 12, seed=2, dtype=dtype),
        make_tensor(NUM_QUERIES, 3, seed=3, dtype=dtype),
    )


def make_attention(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return query_THC and key_SGC."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=4, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=5, dtype=dtype),
    )


def weights(num_queries: int) -> Tensor:
    """Return weight_T of a fixed weighting of queries."""
    return make_tensor(num_queries, seed=98)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4)]
)
def test_loss_equals_loops(dtype: torch.dtype, tolerance: float) -> None:
    indexer, (query_THC, key_SGC) = make_indexer(dtype), make_attention(dtype)
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=6)
    keys = ranges_listed(*ranges)
    weight_T = weights(NUM_QUERIES)
    loss, kl_TG = dense_indexer_loss(*indexer, query_THC, key_SGC, *ranges, weight_T, scale=SCALE)
    _, target = loop_attention(query_THC, key_SGC, key_SGC, keys, SCALE)
    assert loss.dtype == kl_TG.dtype == torch.promote_types(dtype, torch.float32), "types"
    assert_close(loss, (weight_T[:, None] * kl_TG).sum(), 1e-5)
    assert_close(kl_TG, loop_divergence(target, loop_scores(*indexer, *ranges), keys), tolerance)


def test_gradients_equal_finite_differences() -> None:
    shapes = [(5, 2, 4), (7, 4), (5, 2)]
    indexer = [make_tensor(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    query_THC, key_SGC = make_tensor(5, 6, 3, seed=4), make_tensor(7, 2, 3, seed=5)
    start_T, end_T = torch.tensor([0, 2, 3, 0, 6]), torch.tensor([7, 5, 3, 1, 7])

    def loss(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        rest = query_THC, key_SGC, start_T, end_T, weights(5)
        return dense_indexer_loss(q_TIJ, k_SJ, gate_TI, *rest, scale=SCALE)[0]

    assert torch.autograd.gradcheck(loss, indexer, fast_mode=True), "dense"


def test_only_the_indexer_learns() -> None:
    indexer = trainable(make_indexer())
    attention = trainable(make_attention())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=13)
    weight_T = weights(NUM_QUERIES).requires_grad_()
    loss, kl_TG = dense_indexer_loss(*indexer, *attention, *ranges, weight_T, scale=SCALE)
    loss.backward()
    assert weight_T.grad is None and not kl_TG.requires_grad, "weights and report are detached"
    is_empty_T = ranges[0] >= ranges[1]
    for tensor in indexer:
        assert tensor.grad is not None and tensor.grad.isfinite().all(), "finite gradients"
    for tensor in (indexer[0], indexer[2]):
        assert tensor.grad is not None and not tensor.grad[is_empty_T].any(), "empty ranges"
    assert attention[0].grad is None and attention[1].grad is None, "the attention is detached"


def test_results_are_invariant_to_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    indexer = trainable(make_indexer())
    attention = make_attention()
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=15)

    def everything() -> list[Tensor]:
        loss, kl_TG = dense_indexer_loss(
            *indexer, *attention, *ranges, weights(NUM_QUERIES), scale=SCALE
        )
        return [kl_TG, *torch.autograd.grad(loss, indexer)]

    whole = everything()
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 100_000)
    for actual, expected in zip(everything(), whole, strict=True):
        assert_close(actual, expected, 1e-12)


def saved_elements(call: Callable[[], Tensor]) -> int:
    """Return how many elements of distinct storages autograd keeps after `call`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def test_memory_grows_linearly() -> None:
    def kept(length: int) -> int:
        q_TIJ = make_tensor(length, 2, 4, seed=16)
        k_SJ, gate_TI = make_tensor(length, 4, seed=17), make_tensor(length, 2, seed=18)
        indexer = trainable((q_TIJ, k_SJ, gate_TI))
        query_THC, key_SGC = make_tensor(length, 2, 4, seed=19), make_tensor(length, 1, 4, seed=20)
        rest = query_THC, key_SGC, *document_ranges(length), weights(length)
        return saved_elements(lambda: dense_indexer_loss(*indexer, *rest, scale=SCALE)[0])

    assert kept(512) <= 2.1 * kept(256), "twice the length, twice the memory"


def test_packed_documents_do_not_see_each_other() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer()
    query_THC, key_SGC = make_attention()
    rest = query_THC, key_SGC, *document_ranges(20, 43), weights(NUM_QUERIES)
    _, both_TG = dense_indexer_loss(q_TIJ, k_SJ, gate_TI, *rest, scale=SCALE)
    _, alone_TG = dense_indexer_loss(
        q_TIJ[20:],
        k_SJ[20:63],
        gate_TI[20:],
        query_THC[20:],
        key_SGC[20:63],
        *document_ranges(43),
        weights(43),
        scale=SCALE,
    )
    assert_close(both_TG[20:], alone_TG, 1e-12)


def test_a_misfit_is_named() -> None:
    indexer, (query_THC, key_SGC) = make_indexer(), make_attention()
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=19)
    with pytest.raises(ValueError, match="key_SGC: got S = 99"):
        dense_indexer_loss(
            *indexer, query_THC, key_SGC[1:], *ranges, weights(NUM_QUERIES), scale=SCALE
        )
