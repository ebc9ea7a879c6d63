# SPDX-License-Identifier: Apache-2.0
"""Tests of the sparse decode over a paged cache."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.indexer_quantization import quantize, round_to_fp8
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_decode import PagedCache, sparse_decode
from megatron_keye.kernels.sparse_decode.reference import sparse_decode as eager_decode
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    device,
    listed,
    loop_attention,
    loop_scores,
    loop_top_k,
    make_tensor,
    moved,
)

SCALE = 0.3
PAGE = 8
LENGTHS = (0, 2, 8, 41, 56)
"""None, fewer than the queries, up to a page's end, within a page, all that the table holds."""
NUM_PAGES = 7


def moved_cache(cache: PagedCache, impl: str) -> PagedCache:
    """Return the cache on the device where `impl` is tested."""
    return PagedCache(*(t if t is None else t.to(device(impl)) for t in cache))


class Case:
    """Inputs of a decode, and the same keys in a row for each sequence."""

    def __init__(
        self,
        *,
        num_queries: int = 1,
        heads: int = 6,
        groups: int = 2,
        channels: int = 10,
        indexer_channels: int = 12,
        page: int = PAGE,
        lengths: tuple[int, ...] = LENGTHS,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        num_sequences, capacity = len(lengths), NUM_PAGES * page
        self.q_BTIJ = make_tensor(
            num_sequences, num_queries, 3, indexer_channels, seed=1, dtype=dtype
        )
        self.gate_BTI = make_tensor(num_sequences, num_queries, 3, seed=2, dtype=dtype)
        self.query_BTHC = make_tensor(
            num_sequences, num_queries, heads, channels, seed=3, dtype=dtype
        )
        self.k_BSGC = make_tensor(num_sequences, capacity, groups, channels, seed=4, dtype=dtype)
        self.v_BSGC = make_tensor(num_sequences, capacity, groups, channels, seed=5, dtype=dtype)
        self.k_BSJ = make_tensor(num_sequences, capacity, indexer_channels, seed=6, dtype=dtype)
        self.lengths = lengths
        self.cache = self._page(page)

    def _page(self, page: int) -> PagedCache:
        """Scatter the rows over shuffled pages; what nobody may load is NaN."""
        num_sequences = len(self.lengths)
        used = [-(-length // page) for length in self.lengths]
        order = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(7)).tolist()
        pages_BN = torch.full((num_sequences, NUM_PAGES), -1, dtype=torch.int32)
        paged = []
        for row_BSX in (self.k_BSGC, self.v_BSGC, self.k_BSJ):
            paged.append(row_BSX.new_full((sum(used) + 3, page, *row_BSX.shape[2:]), torch.nan))
        for sequence, length in enumerate(self.lengths):
            for first in range(0, length, page):
                number = order.pop()
                pages_BN[sequence, first // page] = number
                here = min(page, length - first)
                for pool, row_BSX in zip(
                    paged, (self.k_BSGC, self.v_BSGC, self.k_BSJ), strict=True
                ):
                    pool[number, :here] = row_BSX[sequence, first : first + here]
        return PagedCache(*paged, pages_BN, torch.tensor(self.lengths))

    def decode(self, k: int, impl: str) -> tuple[Tensor, Tensor]:
        """Run the operator."""
        tensors = moved((self.q_BTIJ, self.gate_BTI, self.query_BTHC), impl)
        cache = moved_cache(self.cache, impl)
        out_BTHC, indices_BTK = sparse_decode(*tensors, cache, k, scale=SCALE, impl=impl)
        return out_BTHC.cpu(), indices_BTK.cpu()

    def by_loops(self, sequence: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return output [T, H, C] and selection [T, K] of one sequence, entry by entry."""
        num_queries = self.q_BTIJ.shape[1]
        length = self.lengths[sequence]
        end_T = torch.tensor([max(0, length - num_queries + 1 + t) for t in range(num_queries)])
        start_T = torch.zeros_like(end_T)
        indexer = self.q_BTIJ[sequence], self.k_BSJ[sequence], self.gate_BTI[sequence]
        selected = loop_top_k(loop_scores(*indexer, start_T, end_T), start_T, end_T, k)
        keys = listed(torch.from_numpy(selected))
        heads = self.query_BTHC[sequence], self.k_BSGC[sequence], self.v_BSGC[sequence]
        return loop_attention(*heads, keys, SCALE)[0], selected


@pytest.mark.parametrize(("num_queries", "k"), [(1, 9), (3, 4)])
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("eager", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)],
)
def test_output_and_selection_equal_loops(
    impl: str,
    dtype: torch.dtype,
    tolerance: float,
    num_queries: int,
    k: int,
    fill_new_with_nan: None,
) -> None:
    case = Case(num_queries=num_queries, dtype=dtype)
    out_BTHC, indices_BTK = case.decode(k, impl)
    for sequence in range(len(LENGTHS)):
        out, selected = case.by_loops(sequence, k)
        np.testing.assert_array_equal(indices_BTK[sequence].numpy(), selected)
        assert_close(out_BTHC[sequence], out, tolerance)
    assert not out_BTHC[0].any(), "an empty sequence gives zero"


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (8, 1)])
def test_triton_takes_other_shapes_in_bfloat16(
    heads: int, groups: int, fill_new_with_nan: None
) -> None:
    case = Case(
        heads=heads, groups=groups, channels=16, page=5, lengths=(3, 35), dtype=torch.bfloat16
    )
    out_BTHC, indices_BTK = case.decode(20, "triton")
    for sequence in range(2):
        out, selected = case.by_loops(sequence, 20)
        np.testing.assert_array_equal(indices_BTK[sequence].numpy(), selected)
        assert_norm_close(out_BTHC[sequence], torch.from_numpy(out), 2.0**-6)


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_keye.kernels.sparse_decode import triton

    case = Case(num_queries=2, lengths=(2, 56), dtype=torch.float32)
    monkeypatch.setattr(triton, "ATTEND_BLOCKS", triton.ATTEND_BLOCKS._replace(keys=16))
    outputs = []
    for programs in (1, 64):
        monkeypatch.setattr(triton, "PROGRAMS", programs)
        outputs.append(case.decode(50, "triton")[0])
    assert_close(outputs[0], outputs[1], 1e-6)
    assert_close(outputs[0][1], case.by_loops(1, 50)[0], 1e-5)


def few_values(scores_TS: Tensor) -> Tensor:
    """Return scores of which most are tied, with both zeros and -inf among them."""
    rounded_TS = scores_TS.round()
    return torch.where(
        scores_TS < -1.5, -torch.inf, torch.where(rounded_TS == 0, -0.0, rounded_TS)
    )


@pytest.mark.parametrize(
    ("change", "k"), [(torch.clone, 40), (few_values, 9), (torch.zeros_like, 3)]
)
def test_selecting_from_parts_equals_selecting_from_rows(
    change: Callable[[Tensor], Tensor], k: int
) -> None:
    from megatron_keye.kernels.sparse_decode.triton_select import select_from_parts

    num_keys, num_parts = 64, 4
    scores_TS = change(make_tensor(5, num_keys, seed=1, dtype=torch.float32))
    end_T = torch.tensor([0, 17, 30, 40, num_keys])
    scores_TS = scores_TS.masked_fill(torch.arange(num_keys) >= end_T[:, None], torch.nan)
    size = num_keys // num_parts
    end_TX = (end_T[:, None] - size * torch.arange(num_parts)).clamp(0, size)
    on_device = moved((scores_TS, end_T, end_TX), "triton")
    expected = loop_top_k(scores_TS.double().numpy(), torch.zeros_like(end_T), end_T, k)
    got_TK = select_from_parts(*on_device, k)
    np.testing.assert_array_equal(got_TK.cpu().numpy(), expected)


def test_long_rows_are_cut_into_parts_while_that_helps() -> None:
    from megatron_keye.kernels.sparse_decode.triton_select import choose_parts

    assert choose_parts(1, 131_072, 2048) == 8, "one row"
    assert choose_parts(32, 131_072, 2048) == 4, "as many programs as multiprocessors"
    assert choose_parts(1, 4096, 2048) == 1, "few more keys than are selected"
    assert choose_parts(1, 131_071, 16) == 1, "parts have equal sizes"


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("eager", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)],
)
def test_keys_of_8_bits_give_what_their_numbers_give(
    impl: str, dtype: torch.dtype, tolerance: float, fill_new_with_nan: None
) -> None:
    plain = Case(num_queries=2, dtype=dtype, indexer_channels=16)
    values_PLJ, scales_PL = quantize(plain.cache.index_keys_PLJ.nan_to_num(), impl="eager")
    plain.q_BTIJ = round_to_fp8(plain.q_BTIJ, impl="eager")
    # Unused places hold NaN, as they do in the plain case.
    is_unused_PL = plain.cache.index_keys_PLJ.isnan().any(dim=-1)
    scales_PL = scales_PL.masked_fill(is_unused_PL, torch.nan)
    plain.cache = plain.cache._replace(index_keys_PLJ=values_PLJ, index_scales_PL=scales_PL)
    plain.k_BSJ = round_to_fp8(plain.k_BSJ, impl="eager")
    out_BTHC, indices_BTK = plain.decode(9, impl)
    for sequence in range(len(LENGTHS)):
        out, selected = plain.by_loops(sequence, 9)
        np.testing.assert_array_equal(indices_BTK[sequence].numpy(), selected)
        assert_close(out_BTHC[sequence], out, tolerance)


def rounded_heads(case: Case) -> tuple[PagedCache, Tensor, Tensor]:
    """Return the cache with keys and values of 8 bits, and what these are in a row."""
    cache = case.cache
    is_unused_PLG = cache.keys_PLGC.isnan().any(dim=-1)
    rounded = []
    for heads_PLGC in cache[:2]:
        values_PLGC, scales_PLG = quantize_heads(heads_PLGC.nan_to_num())
        values_PLGC.view(torch.uint8)[is_unused_PLG] = 0x7F
        rounded.append((values_PLGC, scales_PLG.masked_fill(is_unused_PLG, torch.nan)))
    (keys_PLGC, key_scales_PLG), (values_PLGC, value_scales_PLG) = rounded
    cache = cache._replace(
        keys_PLGC=keys_PLGC,
        values_PLGC=values_PLGC,
        key_scales_PLG=key_scales_PLG,
        value_scales_PLG=value_scales_PLG,
    )
    k_BSGC, v_BSGC = (
        dequantize_heads(*quantize_heads(heads_BSGC), torch.float64)
        for heads_BSGC in (case.k_BSGC, case.v_BSGC)
    )
    return cache, k_BSGC, v_BSGC


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 2.0**-7),
    ],
)
def test_keys_and_values_of_8_bits_give_what_their_numbers_give(
    impl: str,
    dtype: torch.dtype,
    tolerance: float,
    num_queries: int,
    fill_new_with_nan: None,
) -> None:
    case = Case(num_queries=num_queries, dtype=dtype)
    # Heads of different sizes, whose scales must not be mixed up.
    for pool in (*case.cache[:2], case.k_BSGC, case.v_BSGC):
        pool[..., 1, :] *= 50
    case.cache, case.k_BSGC, case.v_BSGC = rounded_heads(case)
    out_BTHC, indices_BTK = case.decode(9, impl)
    for sequence in range(len(LENGTHS)):
        out, selected = case.by_loops(sequence, 9)
        np.testing.assert_array_equal(indices_BTK[sequence].numpy(), selected)
        for row, wanted in zip(out_BTHC[sequence], torch.from_numpy(out), strict=True):
            assert_norm_close(row, wanted, tolerance)
    assert not out_BTHC[0].any(), "an empty sequence gives zero"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_keys_of_8_bits_may_lie_beside_their_values(impl: str) -> None:
    case = Case(num_queries=2, dtype=torch.float32)
    case.cache, _, _ = rounded_heads(case)
    plain_BTHC, _ = case.decode(9, impl)
    cache = case.cache
    heads = torch.stack([each.view(torch.uint8) for each in cache[:2]], dim=2)
    keys_PLGC, values_PLGC = heads.view(torch.float8_e4m3fn).unbind(2)
    scales = torch.stack([cache.key_scales_PLG, cache.value_scales_PLG], dim=2).unbind(2)
    case.cache = cache._replace(
        keys_PLGC=keys_PLGC,
        values_PLGC=values_PLGC,
        key_scales_PLG=scales[0],
        value_scales_PLG=scales[1],
    )
    assert torch.equal(case.decode(9, impl)[0], plain_BTHC), "the same bits"
    case.cache = case.cache._replace(value_scales_PLG=scales[1].contiguous())
    assert torch.equal(case.decode(9, impl)[0], plain_BTHC), "scales of different strides"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_key_without_a_page_ranks_last_and_is_not_attended(impl: str) -> None:
    case = Case(lengths=(30,), dtype=torch.float32)
    case.cache.pages_BN[0, 1] = -1
    case.cache.pages_BN[0, 2] = 2**31 - 1
    out_BTHC, indices_BTK = case.decode(14, impl)
    assert indices_BTK.flatten().tolist() == [*range(8), *range(24, 30)], "those with a page"
    keys = listed(indices_BTK[0])
    out, _ = loop_attention(case.query_BTHC[0], case.k_BSGC[0], case.v_BSGC[0], keys, SCALE)
    assert_close(out_BTHC[0], out, 1e-5)
    more_BTHC, more_BTK = case.decode(20, impl)
    assert more_BTK[0, 0].tolist() == [*range(14), *range(24, 30)], "then the first of the rest"
    assert_close(more_BTHC, out_BTHC, 1e-6)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strides_do_not_matter(impl: str) -> None:
    case = Case(num_queries=2, lengths=(5, 20), dtype=torch.float32)
    plain_BTHC, plain_BTK = case.decode(9, impl)
    case.cache = PagedCache(*(t.mT.contiguous().mT for t in case.cache[:4]), case.cache.lengths_B)
    case.q_BTIJ, case.gate_BTI, case.query_BTHC = (
        t.transpose(0, 1).contiguous().transpose(0, 1)
        for t in (case.q_BTIJ, case.gate_BTI, case.query_BTHC)
    )
    out_BTHC, indices_BTK = case.decode(9, impl)
    assert torch.equal(indices_BTK, plain_BTK), "selection"
    assert_close(out_BTHC, plain_BTHC, 1e-6)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_no_sequences_no_pages(impl: str) -> None:
    case = Case(lengths=(5, 40), dtype=torch.float32)
    case.cache = case.cache._replace(pages_BN=case.cache.pages_BN[:, :0])
    out_BTHC, indices_BTK = case.decode(4, impl)
    assert not out_BTHC.any() and (indices_BTK == -1).all(), "a table without pages"
    none = moved((case.q_BTIJ[:0], case.gate_BTI[:0], case.query_BTHC[:0]), impl)
    cache = case.cache._replace(
        pages_BN=case.cache.pages_BN[:0], lengths_B=case.cache.lengths_B[:0]
    )
    cache = moved_cache(cache, impl)
    out_BTHC, indices_BTK = sparse_decode(*none, cache, 4, scale=SCALE, impl=impl)
    assert out_BTHC.shape[0] == indices_BTK.shape[0] == 0, "no sequences"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_triton_equals_eager_at_the_models_size(dtype: torch.dtype, num_queries: int) -> None:
    lengths, page = (0, 5, 2048, 70_001), 64
    num_pages = -(-max(lengths) // page)
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    pages_BN = torch.randperm(len(lengths) * num_pages, generator=generator, device="cuda")
    cache = PagedCache(
        normal(len(lengths) * num_pages, page, 4, 128),
        normal(len(lengths) * num_pages, page, 4, 128),
        normal(len(lengths) * num_pages, page, 64),
        pages_BN.view(len(lengths), num_pages).int(),
        torch.tensor(lengths, device="cuda"),
    )
    q_BTIJ, gate_BTI = normal(4, num_queries, 16, 64), normal(4, num_queries, 16)
    query_BTHC = normal(4, num_queries, 32, 128)
    inputs = q_BTIJ, gate_BTI, query_BTHC
    out_BTHC, indices_BTK = sparse_decode(*inputs, cache, 2048, scale=0.1, impl="triton")
    wide = PagedCache(*(t.double() for t in cache[:3]), *cache[3:])
    _, expected_BTK = eager_decode(*(t.double() for t in inputs), wide, 2048, scale=0.1)
    assert torch.equal(indices_BTK < 0, expected_BTK < 0), "padding"
    for sequence, length in enumerate(lengths):
        for got_K, wanted_K in zip(indices_BTK[sequence], expected_BTK[sequence], strict=True):
            # Of 70,001 scores a few near the last rank change places when they are rounded.
            num_other = int((~torch.isin(got_K, wanted_K)).sum())
            assert num_other <= (2 if length > 2048 else 0), f"{num_other} other keys"
        index_TK = indices_BTK[sequence].long()
        slot_TK = pages_BN.view(len(lengths), -1)[sequence][index_TK.clamp(min=0) // page]
        slot_TK = (slot_TK * page + index_TK % page).masked_fill(index_TK < 0, -1)
        out_THC, _ = sparse_attention(
            inputs[2][sequence].double(),
            wide.keys_PLGC.flatten(0, 1),
            wide.values_PLGC.flatten(0, 1),
            slot_TK,
            scale=0.1,
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
        assert_norm_close(out_BTHC[sequence], out_THC, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_gpu_attends_to_8_bits_at_the_models_size(num_queries: int, is_quantized: bool) -> None:
    from tests.support.decode_cases import Sizes, exact_attention, make_decode

    sizes = Sizes(
        (0, 5, 2048, 70_001),
        num_queries=num_queries,
        is_quantized=is_quantized,
        has_fp8_heads=True,
    )
    queries, cache = make_decode(sizes)
    out_BTHC, indices_BTK = sparse_decode(*queries, cache, 2048, scale=0.1, impl="triton")
    exact_BTHC = exact_attention(queries[2], cache, indices_BTK, 0.1)
    for row, wanted in zip(out_BTHC.flatten(0, 1), exact_BTHC.flatten(0, 1), strict=True):
        assert_norm_close(row, wanted, 2.0**-7)


def test_a_misfit_is_named() -> None:
    case = Case(lengths=(5, 40))
    inputs = case.q_BTIJ, case.gate_BTI, case.query_BTHC
    with pytest.raises(ValueError, match="k: got 0, expected 1 or more"):
        sparse_decode(*inputs, case.cache, 0, scale=SCALE)
    with pytest.raises(ValueError, match="lengths_B: got B = 1"):
        cache = case.cache._replace(lengths_B=case.cache.lengths_B[1:])
        sparse_decode(*inputs, cache, 4, scale=SCALE)
    with pytest.raises(ValueError, match="pages_BN: got torch.int64, expected int32"):
        cache = case.cache._replace(pages_BN=case.cache.pages_BN.long())
        sparse_decode(*inputs, cache, 4, scale=SCALE)
    with pytest.raises(ValueError, match="index_keys_PLJ: got torch.float32"):
        cache = case.cache._replace(index_keys_PLJ=case.cache.index_keys_PLJ.float())
        sparse_decode(*inputs, cache, 4, scale=SCALE)
    cached, _, _ = rounded_heads(case)
    with pytest.raises(ValueError, match="got one of them, expected both or neither"):
        sparse_decode(*inputs, cached._replace(key_scales_PLG=None), 4, scale=SCALE)
    with pytest.raises(ValueError, match="value_scales_PLG: got G = 1"):
        scales_PLG = cached.value_scales_PLG[..., :1]
        sparse_decode(*inputs, cached._replace(value_scales_PLG=scales_PLG), 4, scale=SCALE)
    with pytest.raises(ValueError, match="values_PLGC: got torch.float64, expected float8"):
        cache = cached._replace(values_PLGC=case.cache.values_PLGC)
        sparse_decode(*inputs, cache, 4, scale=SCALE)
    with pytest.raises(ValueError, match="keys_PLGC: got torch.float8_e4m3fn, expected"):
        cache = case.cache._replace(keys_PLGC=cached.keys_PLGC)
        sparse_decode(*inputs, cache, 4, scale=SCALE)
    with pytest.raises(ValueError, match="index_keys_PLJ: got torch.float64, expected float8"):
        scales_PL = torch.ones(case.cache.index_keys_PLJ.shape[:2])
        cache = case.cache._replace(index_scales_PL=scales_PL)
        sparse_decode(*inputs, cache, 4, scale=SCALE)
