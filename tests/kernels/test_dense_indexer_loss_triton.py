# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's loss over whole ranges in Triton."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.dense_attention import dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import autograd, dense_indexer_loss
from megatron_keye.kernels.dense_indexer_loss.triton import loss as triton_loss
from megatron_keye.kernels.dense_indexer_loss.triton import tiles
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    device,
    document_ranges,
    make_tensor,
    moved,
    odd_ranges,
    trainable,
)

SCALE = 0.3

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = tuple[Tensor, Tensor]


def make_inputs(
    num_queries: int,
    num_keys: int,
    *,
    indexer: tuple[int, int] = (3, 12),
    attention: tuple[int, int, int] = (4, 2, 10),
    dtype: torch.dtype = torch.float32,
) -> tuple[Inputs, Attention]:
    """Return q_TIJ, k_SJ, gate_TI and query_THC, key_SGC; sizes are (I, J) and (H, G, C)."""
    heads, groups, channels = attention
    of_indexer = (
        make_tensor(num_queries, *indexer, seed=1, dtype=dtype),
        make_tensor(num_keys, indexer[1], seed=2, dtype=dtype),
        make_tensor(num_queries, indexer[0], seed=3, dtype=dtype),
    )
    of_attention = (
        make_tensor(num_queries, heads, channels, seed=4, dtype=dtype),
        make_tensor(num_keys, groups, channels, seed=5, dtype=dtype),
    )
    return moved(of_indexer, "triton"), moved(of_attention, "triton")


def loss_and_gradients(
    indexer: Inputs,
    attention: Attention,
    ranges: tuple[Tensor, Tensor],
    impl: str = "triton",
    lse_TH: Tensor | None = None,
) -> list[Tensor]:
    """Return kl_TG, dq_TIJ, dk_SJ and dgate_TI of a fixed weighting; in float64 with "eager"."""
    dtype = torch.float64 if impl == "eager" else indexer[0].dtype
    q_TIJ, k_SJ, gate_TI = (tensor.detach().to(dtype) for tensor in indexer)
    inputs = trainable((q_TIJ, k_SJ, gate_TI))
    (weight_T,) = moved((make_tensor(len(q_TIJ), seed=98),), "triton")
    loss, kl_TG = dense_indexer_loss(
        *inputs,
        *(tensor.to(dtype) for tensor in attention),
        *moved(ranges, "triton"),
        weight_T,
        lse_TH,
        scale=SCALE,
        impl=impl,
    )
    assert loss.dtype == kl_TG.dtype == torch.promote_types(dtype, torch.float32), "types"
    assert_close(loss.detach(), (weight_T[:, None] * kl_TG).sum(), 1e-5)
    # Any other upstream gradient than 1 shows whether it is used.
    return [kl_TG, *torch.autograd.grad(-2.5 * loss, inputs)]


def assert_equals_float64(
    indexer: Inputs, attention: Attention, ranges: tuple[Tensor, Tensor], tolerance: float
) -> list[Tensor]:
    """Compare value and gradients with the eager form; return what Triton gave."""
    got = loss_and_gradients(indexer, attention, ranges)
    wanted = loss_and_gradients(indexer, attention, ranges, "eager")
    assert_close(got[0], wanted[0], 2e-5)
    for actual, expected, given in zip(got[1:], wanted[1:], indexer, strict=True):
        assert actual.dtype == given.dtype, "gradient type"
        assert_norm_close(actual, expected, tolerance)
    return got


SHAPES = [
    # queries, keys, (I, J), (H, G, C): odd ones first, groups of 1, 3 and 8 heads.
    (1, 1, (1, 1), (1, 1, 1)),
    (33, 40, (3, 12), (6, 2, 10)),
    (9, 130, (2, 16), (2, 2, 16)),
    (20, 40, (1, 5), (8, 1, 20)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_eager_in_float64(
    shape: tuple[int, int, tuple[int, int], tuple[int, int, int]], fill_new_with_nan: None
) -> None:
    num_queries, num_keys, indexer, attention = shape
    inputs = make_inputs(num_queries, num_keys, indexer=indexer, attention=attention)
    assert_equals_float64(*inputs, odd_ranges(num_queries, num_keys, seed=6), 5e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2.0**-6), (torch.float16, 2.0**-6)]
)
def test_16_bit_inputs_span_several_tiles_and_blocks(
    dtype: torch.dtype, tolerance: float, fill_new_with_nan: None
) -> None:
    inputs = make_inputs(140, 150, indexer=(1, 16), attention=(1, 1, 16), dtype=dtype)
    ranges = document_ranges(70, 3, 67)
    assert_equals_float64(*inputs, ranges, tolerance)


def test_a_known_lse_takes_the_place_of_its_pass(
    monkeypatch: pytest.MonkeyPatch, fill_new_with_nan: None
) -> None:
    indexer, attention = make_inputs(33, 40)
    ranges = moved(odd_ranges(33, 40, seed=7), "triton")
    found = loss_and_gradients(indexer, attention, ranges)
    _, lse_TH = dense_attention_with_lse(
        *attention, attention[1], *ranges, scale=SCALE, impl="eager"
    )
    monkeypatch.delattr(autograd, "attention_lse")
    known = loss_and_gradients(indexer, attention, ranges, lse_TH=lse_TH)
    for actual, expected in zip(known, found, strict=True):
        assert_close(actual, expected, 2e-6)
    is_empty_T = ranges[0] >= ranges[1]
    assert is_empty_T.any() and not known[0][is_empty_T].any(), "no keys, no loss"


def test_nothing_that_learns_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    indexer, attention = make_inputs(33, 40)
    ranges = odd_ranges(33, 40, seed=7)
    kl_TG, *_ = loss_and_gradients(indexer, attention, ranges)
    monkeypatch.delattr(triton_loss, "Gradients")
    arguments = (*attention, *moved((*ranges, torch.ones(33)), "triton"))
    for inputs in (indexer, trainable(indexer)):
        with torch.no_grad():
            loss, alone_TG = dense_indexer_loss(*inputs, *arguments, scale=SCALE, impl="triton")
        assert not loss.requires_grad and torch.equal(alone_TG, kl_TG), "the same bits"
    with pytest.raises(NameError, match="Gradients"):
        dense_indexer_loss(*trainable(indexer), *arguments, scale=SCALE, impl="triton")


def test_a_misfit_of_what_is_known_is_named() -> None:
    indexer, attention = make_inputs(33, 40)
    ranges = moved(odd_ranges(33, 40, seed=7), "triton")
    weight_T = attention[0][:, 0, 0]
    lse_TH = attention[0][:, :3, 0]
    with pytest.raises(ValueError, match="attention_lse_TH: got H = 3"):
        dense_indexer_loss(*indexer, *attention, *ranges, weight_T, lse_TH, scale=SCALE)
    lse_TH = attention[0][:, :, 0].bfloat16()
    with pytest.raises(ValueError, match="attention_lse_TH: got .*bfloat16"):
        dense_indexer_loss(*indexer, *attention, *ranges, weight_T, lse_TH, scale=SCALE)
    with pytest.raises(ValueError, match="weight_T: got T = 32"):
        dense_indexer_loss(*indexer, *attention, *ranges, weight_T[1:], scale=SCALE)


def test_small_upstream_gradients_survive_float16() -> None:
    indexer, attention = make_inputs(
        20, 40, indexer=(1, 16), attention=(1, 1, 16), dtype=torch.float16
    )
    q_TIJ, k_SJ, gate_TI = trainable(indexer)
    ranges = torch.zeros(20, dtype=torch.int64), torch.full((20,), 40), torch.ones(20)
    loss, _ = dense_indexer_loss(
        q_TIJ,
        k_SJ,
        1e3 * gate_TI,
        *attention,
        *moved(ranges, "triton"),
        scale=SCALE,
        impl="triton",
    )
    whole, small = (
        torch.autograd.grad(factor * loss, k_SJ, retain_graph=True)[0] for factor in (1.0, 1e-5)
    )
    assert_norm_close(small.double() * 1e5, whole, 2e-2)


def test_packed_documents_do_not_see_each_other() -> None:
    (q_TIJ, k_SJ, gate_TI), (query_THC, key_SGC) = make_inputs(30, 30, attention=(2, 1, 10))
    both = loss_and_gradients(
        (q_TIJ, k_SJ, gate_TI), (query_THC, key_SGC), document_ranges(12, 18)
    )
    alone_TG, *_ = loss_and_gradients(
        (q_TIJ[12:], k_SJ[12:], gate_TI[12:]), (query_THC[12:], key_SGC[12:]), document_ranges(18)
    )
    assert_close(both[0][12:], alone_TG, 2e-6)
    k_SJ, key_SGC = k_SJ.clone(), key_SGC.clone()
    k_SJ[12:], key_SGC[12:] = 30.0, -30.0
    changed = loss_and_gradients(
        (q_TIJ, k_SJ, gate_TI), (query_THC, key_SGC), document_ranges(12, 18)
    )
    for index in (0, 1, 3):
        assert torch.equal(changed[index][:12], both[index][:12]), "the first document's bits"


def test_rows_without_keys_give_zero(fill_new_with_nan: None) -> None:
    inputs = make_inputs(33, 40, attention=(1, 1, 10))
    ranges = torch.full((33,), 7), torch.full((33,), 7)
    for tensor in loss_and_gradients(*inputs, ranges):
        assert not tensor.any(), "neither loss nor gradient"
    ranges[1][5] = 9
    kl_TG, dq_TIJ, dk_SJ, dgate_TI = assert_equals_float64(*inputs, ranges, 5e-6)
    is_alone_T = torch.arange(33, device=kl_TG.device) == 5
    for tensor in (kl_TG, dq_TIJ, dgate_TI):
        assert not tensor[~is_alone_T].any(), "queries without keys"
    assert not dk_SJ[:7].any() and not dk_SJ[9:].any(), "keys that nobody sees"


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 5), (5, 0)])
def test_no_queries_and_no_keys(num_queries: int, num_keys: int) -> None:
    inputs = make_inputs(num_queries, num_keys)
    none_T = torch.zeros(num_queries, dtype=torch.int64)
    kl_TG, *got = loss_and_gradients(*inputs, (none_T, none_T))
    assert kl_TG.shape == (num_queries, 2) and not kl_TG.any(), "loss"
    for gradient, tensor in zip(got, inputs[0], strict=True):
        assert gradient.shape == tensor.shape and not gradient.any(), "gradient"


def test_peaked_attention_and_scores_stay_finite() -> None:
    (q_TIJ, k_SJ, gate_TI), (query_THC, key_SGC) = make_inputs(20, 40)
    ranges = odd_ranges(20, 40, seed=7)
    got = loss_and_gradients((q_TIJ, k_SJ, 100 * gate_TI), (100 * query_THC, key_SGC), ranges)
    wanted = loss_and_gradients(
        (q_TIJ, k_SJ, 100 * gate_TI), (100 * query_THC, key_SGC), ranges, "eager"
    )
    for actual, expected in zip(got, wanted, strict=True):
        assert_norm_close(actual, expected, 1e-4)


def test_chunks_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    indexer, attention = make_inputs(140, 20, indexer=(1, 8), attention=(1, 1, 8))
    ranges = odd_ranges(140, 20, seed=8)
    whole = loss_and_gradients(indexer, attention, ranges)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 1)
    assert len(list(tiles.query_chunks(140, 20))) == 2, "one tile per chunk"
    q_TIJ, k_SJ, gate_TI = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in indexer)
    query_THC, key_SGC = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in attention)
    chunked = loss_and_gradients((q_TIJ, k_SJ, gate_TI), (query_THC, key_SGC), ranges)
    for index in (0, 1, 3):
        assert torch.equal(chunked[index], whole[index]), "what belongs to a query: the same bits"
    assert_close(chunked[2], whole[2], 1e-6)


def test_only_the_indexer_learns_and_calls_repeat_bit_by_bit() -> None:
    indexer, attention = make_inputs(20, 20, attention=(1, 1, 8))
    inputs, (query_THC, key_SGC) = trainable(indexer), trainable(attention)
    rest = moved((*document_ranges(20), torch.ones(20)), "triton")
    rest[2].requires_grad_()

    def once() -> tuple[Tensor, ...]:
        loss, kl_TG = dense_indexer_loss(
            *inputs, query_THC, key_SGC, *rest, scale=SCALE, impl="triton"
        )
        assert not kl_TG.requires_grad, "a report"
        loss.backward()
        for tensor in (query_THC, key_SGC, rest[2]):
            assert tensor.grad is None, "attention and weights are detached"
        found = tuple(tensor.grad for tensor in inputs)
        for tensor in inputs:
            tensor.grad = None
        return (kl_TG, *found)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second), "bits"


def test_triton_refuses_what_it_cannot_do() -> None:
    indexer, attention = make_inputs(3, 5, dtype=torch.float64)
    ranges = moved((*odd_ranges(3, 5, seed=9), torch.ones(3)), "triton")
    with pytest.raises(ValueError, match="q_TIJ: got torch.float64, expected float32"):
        dense_indexer_loss(*indexer, *attention, *ranges, scale=SCALE, impl="triton")
    indexer, attention = make_inputs(3, 5, attention=(1, 1, 257))
    with pytest.raises(ValueError, match="heads of 257 channels, expected at most 256"):
        dense_indexer_loss(*indexer, *attention, *ranges, scale=SCALE, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_eager_in_float64_at_the_models_size(dtype: torch.dtype) -> None:
    inputs = make_inputs(1027, 2053, indexer=(16, 64), attention=(32, 4, 128), dtype=dtype)
    # Of 34 million products a few lie so close to 0 that relu's kink falls to the other side.
    tolerance = 1e-3 if dtype == torch.float32 else 2.0**-6
    for ranges in (odd_ranges(1027, 2053, seed=6), document_ranges(500, 27, 500)):
        assert_equals_float64(*inputs, ranges, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_grows_linearly_up_to_128k() -> None:
    def peak(length: int) -> int:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device("triton"), dtype=torch.bfloat16)

        indexer = trainable((normal(length, 2, 16), normal(length, 16), normal(length, 2)))
        attention = normal(length, 2, 16), normal(length, 1, 16)
        ranges = moved((*document_ranges(length), torch.ones(length)), "triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = dense_indexer_loss(*indexer, *attention, *ranges, scale=SCALE, impl="triton")
        loss.backward()
        return torch.cuda.max_memory_allocated() - before

    shorter, longer = peak(65_536), peak(131_072)
    assert longer <= 2.1 * shorter, f"{shorter} bytes at 64K, {longer} at 128K"
    assert longer < 2**31, "a matrix of queries by keys would take 32 GiB"
