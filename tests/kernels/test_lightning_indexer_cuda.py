# SPDX-License-Identifier: Apache-2.0
"""The CUDA lightning indexer selects exactly the keys that scoring and selecting apart would.

Its shortcuts are what could go wrong: a sample that misjudges a row, too few or too many
candidates, ties at the cut, ranges that begin inside a tile, chunks of queries.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import cuda, lightning_indexer
from megatron_keye.kernels.select_top_k import select_top_k
from tests.support.numerics import document_ranges, make_tensor, odd_ranges

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        missing_reason("lightning_indexer") is not None, reason="megatron_keye._C is not built"
    ),
]

Inputs = tuple[Tensor, Tensor, Tensor]
Ranges = tuple[Tensor, Tensor]


def make_inputs(num_queries: int, num_keys: int, num_heads: int = 16) -> Inputs:
    """Return q_TIJ, k_SJ and gate_TI on the GPU."""
    bf16 = torch.bfloat16
    q_TIJ = make_tensor(num_queries, num_heads, 64, seed=1, dtype=bf16)
    k_SJ = make_tensor(num_keys, 64, seed=2, dtype=bf16)
    return (
        q_TIJ.cuda(),
        k_SJ.cuda(),
        make_tensor(num_queries, num_heads, seed=3, dtype=bf16).cuda(),
    )


def last_rows(num_queries: int, num_keys: int) -> Ranges:
    """Return the ranges of the last queries of a causal row."""
    end_T = torch.arange(num_keys - num_queries + 1, num_keys + 1, device="cuda")
    return torch.zeros_like(end_T), end_T


def on_gpu(ranges: Ranges) -> Ranges:
    return ranges[0].cuda(), ranges[1].cuda()


def as_small_integers(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Inputs:
    """Return inputs of which e4m3 products are summed exactly, each vector with a scale."""
    head_I = torch.arange(q_TIJ.shape[1], device="cuda") % 7 - 3
    block_S = torch.arange(len(k_SJ), device="cuda") // 5000 % 5 - 2
    return (
        q_TIJ.round().clamp(-3, 3) * 2.0 ** head_I[:, None].bfloat16(),
        k_SJ.round().clamp(-3, 3) * 2.0 ** block_S[:, None].bfloat16(),
        gate_TI,
    )


def assert_selects(inputs: Inputs, ranges: Ranges, k: int) -> None:
    """Compare bit by bit with Triton's scores and the selection from a whole matrix.

    Once with products in bfloat16, once in e4m3.
    """
    _assert_selects(inputs, ranges, k, is_rounded=False)
    _assert_selects(as_small_integers(*inputs), ranges, k, is_rounded=True)


def _assert_selects(inputs: Inputs, ranges: Ranges, k: int, *, is_rounded: bool) -> None:
    indices_TK = lightning_indexer(*inputs, *ranges, k, is_rounded=is_rounded, impl="cuda")
    scores_TS = indexer_scores(*inputs, *ranges, impl="triton")
    expected_TK = select_top_k(scores_TS, *ranges, k, impl="triton")
    different = (indices_TK != expected_TK).any(1).nonzero().flatten().tolist()
    form = "e4m3" if is_rounded else "bfloat16"
    assert not different, f"{form}: {len(different)} rows differ, such as {different[:5]}"


@pytest.mark.parametrize("k", [1, 7, 500, 2048])
@pytest.mark.parametrize("num_keys", [1, 127, 4096, 4097, 20001, 70000])
def test_causal_rows(num_keys: int, k: int) -> None:
    num_queries = min(num_keys, 333)
    assert_selects(make_inputs(num_queries, num_keys), last_rows(num_queries, num_keys), k)


@pytest.mark.parametrize("num_heads", [1, 3, 16])
def test_any_number_of_heads(num_heads: int) -> None:
    assert_selects(make_inputs(100, 9000, num_heads), last_rows(100, 9000), 300)


def test_every_query_of_a_row_from_its_first_on() -> None:
    assert_selects(make_inputs(12000, 12000), on_gpu(document_ranges(12000)), 2048)


@pytest.mark.parametrize("lengths", [(5000, 7001, 3), (1, 64, 65, 9000, 17), (300,) * 40])
def test_documents_are_kept_apart(lengths: tuple[int, ...]) -> None:
    num_keys = sum(lengths)
    assert_selects(make_inputs(num_keys, num_keys), on_gpu(document_ranges(*lengths)), 1000)


@pytest.mark.parametrize("num_keys", [100, 30011])
def test_arbitrary_ranges(num_keys: int) -> None:
    assert_selects(make_inputs(500, num_keys), on_gpu(odd_ranges(500, num_keys, seed=4)), 700)


def test_the_longest_rows() -> None:
    assert_selects(make_inputs(70, cuda.MAX_KEYS), last_rows(70, cuda.MAX_KEYS), 2048)


def _no_gates(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    gate_TI.zero_()


def _mostly_zero_scores(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    # One head, so that half of all scores are 0; where its gate is negative those are the best.
    gate_TI[:, 1:] = 0


def _few_distinct_scores(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    for tensor in (q_TIJ, k_SJ, gate_TI):
        tensor.copy_(tensor.sign())
    q_TIJ[:, :, 4:] = 0


def _best_keys_in_one_place(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    q_TIJ.abs_(), gate_TI.abs_()
    k_SJ[:20000].abs_()
    k_SJ[20000:] = -k_SJ[20000:].abs()


def _equal_keys(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    k_SJ[10000:13000] = k_SJ[10000]


def _best_keys_unsampled(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    q_TIJ.abs_(), gate_TI.abs_()
    group_S = torch.arange(len(k_SJ), device="cuda") // 16
    sampled_S = (group_S * 2654435761 % 2**32 >> 16) % 16
    is_sampled_S = sampled_S == torch.arange(len(k_SJ), device="cuda") % 16
    k_SJ.copy_(torch.where(is_sampled_S[:, None], -k_SJ.abs(), k_SJ))


def _best_keys_of_one_thread(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    # Each eighth pair of keys, by turns as the tiles of 128 keys deal them out.
    q_TIJ.abs_(), gate_TI.abs_()
    key_S = torch.arange(len(k_SJ), device="cuda")
    tile_S = key_S // 128
    is_best_S = (key_S // 2 % 4 == tile_S // 2 % 4) & (tile_S % 2 == 0)
    k_SJ.copy_(torch.where(is_best_S[:, None], k_SJ.abs(), -k_SJ.abs()))


def _no_number_for_some_rows(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    gate_TI[::7, 3] = torch.nan


@pytest.mark.parametrize(
    "spoil",
    [
        _no_gates,
        _mostly_zero_scores,
        _few_distinct_scores,
        _best_keys_in_one_place,
        _equal_keys,
        _best_keys_unsampled,
        _best_keys_of_one_thread,
        _no_number_for_some_rows,
    ],
)
@pytest.mark.parametrize("k", [9, 2048])
def test_rows_that_mislead_the_sample(
    spoil: Callable[[Tensor, Tensor, Tensor], None], k: int
) -> None:
    inputs = make_inputs(300, 40000)
    spoil(*inputs)
    assert_selects(inputs, last_rows(300, 40000), k)


@pytest.mark.parametrize("scratch_bytes", [1, 2**23])
def test_the_chunk_changes_nothing(scratch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ranges = make_inputs(500, 9000), last_rows(500, 9000)
    _mostly_zero_scores(*inputs)
    expected_TK = lightning_indexer(*inputs, *ranges, 600, impl="cuda")
    monkeypatch.setattr(cuda, "SCRATCH_BYTES", scratch_bytes)
    assert torch.equal(lightning_indexer(*inputs, *ranges, 600, impl="cuda"), expected_TK), "chunk"
    assert_selects(inputs, ranges, 600)


def test_two_calls_give_the_same_bits() -> None:
    inputs, ranges = make_inputs(3000, 20000), last_rows(3000, 20000)
    _mostly_zero_scores(*inputs)
    first_TK = lightning_indexer(*inputs, *ranges, 2048, impl="cuda")
    for _ in range(3):
        again_TK = lightning_indexer(*inputs, *ranges, 2048, impl="cuda")
        assert torch.equal(first_TK, again_TK), "differs"


def test_the_selection_is_the_best_in_float64() -> None:
    inputs, ranges = make_inputs(40, 30000), last_rows(40, 30000)
    indices_TK = lightning_indexer(*inputs, *ranges, 512, impl="cuda").long()
    exact_TS = indexer_scores(*(each.double() for each in inputs), *ranges, impl="eager")
    worst_T = exact_TS.gather(1, indices_TK).amin(1)
    best_left_T = exact_TS.scatter(1, indices_TK, -torch.inf).amax(1)
    scale = exact_TS[exact_TS.isfinite()].std()
    assert ((best_left_T - worst_T) / scale).max() < 1e-5, "a better key was left"


def test_views_and_no_queries_are_fine() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs(200, 5000)
    ranges = last_rows(100, 5000)
    assert_selects((q_TIJ[::2], k_SJ, gate_TI[::2]), ranges, 50)
    wide_SJ = torch.cat([k_SJ, k_SJ], dim=1)[:, :64]
    assert_selects((q_TIJ[:100], wide_SJ, gate_TI[:100]), ranges, 50)
    none_TK = lightning_indexer(q_TIJ[:0], k_SJ, gate_TI[:0], ranges[0][:0], ranges[1][:0], 5)
    assert none_TK.shape == (0, 5), none_TK.shape


def test_it_is_the_default_for_long_rows_that_it_takes() -> None:
    q_TIJ, k_SJ, _ = make_inputs(4, cuda.PAYS_ABOVE_KEYS + 1)
    assert cuda.suits(q_TIJ, k_SJ, 3) == (torch.cuda.get_device_capability() == (9, 0))
    assert not cuda.suits(q_TIJ, k_SJ[1:], 3), "a short row"
    assert not cuda.suits(q_TIJ.float(), k_SJ.float(), 3), "float32"


def test_refusals_say_what_is_taken() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs(4, 10)
    ranges = last_rows(4, 10)
    with pytest.raises(ValueError, match=r"got torch.float32, expected torch.bfloat16"):
        lightning_indexer(q_TIJ.float(), k_SJ.float(), gate_TI, *ranges, 3, impl="cuda")
    with pytest.raises(ValueError, match="got J = 32, expected 64"):
        lightning_indexer(q_TIJ[..., :32], k_SJ[:, :32], gate_TI, *ranges, 3, impl="cuda")
    with pytest.raises(ValueError, match="got k = 4096, expected at most 2048"):
        lightning_indexer(q_TIJ, k_SJ, gate_TI, *ranges, 4096, impl="cuda")


def test_the_registration_satisfies_torch() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs(5, 300)
    operator = torch.ops.megatron_keye.lightning_indexer.default
    inputs = q_TIJ, k_SJ, None, gate_TI.float(), *last_rows(5, 300), 8, 2**24
    torch.library.opcheck(operator, inputs)
