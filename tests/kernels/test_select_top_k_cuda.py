# SPDX-License-Identifier: Apache-2.0
"""The CUDA top-k selection keeps exactly the keys that a stable sort would keep.

Data movement, so every comparison is bitwise. Hostile rows come first: the published kernels of
this kind failed on ties, on short rows and on offsets beyond 31 bits.
"""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.select_top_k import cuda, select_top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not cuda.is_built(), reason="megatron_keye._C is not built"),
]

ROW_LENGTHS = [1, 63, 1000, 70001]
KEPT = [1, 7, 2048]


def expected_indices(scores_TS: Tensor, start_T: Tensor, end_T: Tensor, k: int) -> Tensor:
    """Select by a stable descending sort of each row's range; NaN counts as less than -inf."""
    indices_TK = torch.full((scores_TS.shape[0], k), -1, dtype=torch.int32)
    for t, row_S in enumerate(scores_TS.cpu().double()):
        start = max(int(start_T[t]), 0)
        end = min(int(end_T[t]), row_S.numel())
        if end <= start:
            continue
        keys = row_S[start:end].clone()
        # Ranks instead of values, since NaN needs a place below -inf.
        is_nan = keys.isnan()
        keys[is_nan] = -torch.inf
        order = torch.sort(keys, descending=True, stable=True).indices
        order = torch.cat([order[~is_nan[order]], order[is_nan[order]]])
        selected = order[:k].sort().values + start
        indices_TK[t, : selected.numel()] = selected.int()
    return indices_TK


def full_range(scores_TS: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_keys = scores_TS.shape
    start_T = torch.zeros(num_rows, dtype=torch.int64, device=scores_TS.device)
    return start_T, torch.full_like(start_T, num_keys)


def assert_selects(scores_TS: Tensor, start_T: Tensor, end_T: Tensor, k: int) -> None:
    got_TK = cuda.select_top_k(scores_TS, start_T, end_T, k)
    assert got_TK.dtype == torch.int32, got_TK.dtype
    expected_TK = expected_indices(scores_TS, start_T, end_T, k)
    assert torch.equal(got_TK.cpu(), expected_TK), (got_TK.cpu(), expected_TK)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("num_keys", ROW_LENGTHS)
def test_selects_what_a_stable_sort_selects(num_keys: int, k: int) -> None:
    scores_TS = torch.randn(5, num_keys, device="cuda")
    assert_selects(scores_TS, *full_range(scores_TS), k)


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("num_keys", ROW_LENGTHS)
def test_ties_go_to_the_lower_key(num_keys: int, k: int) -> None:
    scores_TS = torch.randint(-2, 3, (5, num_keys), device="cuda").float()
    assert_selects(scores_TS, *full_range(scores_TS), k)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("num_keys", [1000, 70001])
def test_equal_scores_select_the_first_keys(num_keys: int, value: float) -> None:
    scores_TS = torch.full((3, num_keys), value, device="cuda")
    assert_selects(scores_TS, *full_range(scores_TS), 700)


def test_negative_zero_equals_zero() -> None:
    scores_TS = torch.zeros(4, 1000, device="cuda")
    scores_TS[:, ::3] = -0.0
    scores_TS[:, 5::7] = -1.0
    assert_selects(scores_TS, *full_range(scores_TS), 100)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_infinite_and_nan_scores_have_their_place(share: float) -> None:
    scores_TS = torch.randn(4, 3001, device="cuda")
    drawn_TS = torch.rand_like(scores_TS)
    scores_TS[drawn_TS < share] = -torch.inf
    scores_TS[drawn_TS < share / 3] = torch.nan
    scores_TS[:, ::997] = torch.inf
    assert_selects(scores_TS, *full_range(scores_TS), 2048)


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1e30])
def test_scores_of_any_size_are_told_apart(scale: float) -> None:
    # Close together: the first digits agree, so that the last one decides (1e-40: subnormal).
    scores_TS = (1 + 1e-5 * torch.rand(4, 20001, device="cuda")) * scale
    assert_selects(scores_TS, *full_range(scores_TS), 2048)


@pytest.mark.parametrize("num_close", [2500, 5119, 5120, 5121, 60000])
def test_any_number_of_keys_may_share_the_first_digit(num_close: int) -> None:
    # 5120 of them fit into shared memory.
    scores_TS = torch.full((2, 70001), -5.0, device="cuda")
    where_S = torch.randperm(70001, device="cuda")[:num_close]
    scores_TS[:, where_S] = 1 + 0.1 * torch.rand(2, num_close, device="cuda")
    assert_selects(scores_TS, *full_range(scores_TS), 2048)


@pytest.mark.parametrize("num_keys", [16383, 16384, 131072, 262144, 262145])
def test_long_rows_are_read_once_or_as_often_as_needed(num_keys: int) -> None:
    scores_TS = torch.randn(6, num_keys, device="cuda")
    scores_TS[1, 1000:3048] += 10  # the sample meets them by chance only
    scores_TS[2] = scores_TS[2].mul(3).round()  # ties at the cut
    scores_TS[3] = torch.arange(num_keys, device="cuda")
    scores_TS[4] = scores_TS[4].where(torch.rand(num_keys, device="cuda") < 0.01, -torch.inf)
    scores_TS[5, : num_keys // 2] -= 1000
    assert_selects(scores_TS, *full_range(scores_TS), 2048)
    assert_selects(scores_TS, *full_range(scores_TS), 100)


@pytest.mark.parametrize("k", KEPT)
def test_ranges_bound_the_selection(k: int) -> None:
    scores_TS = torch.randn(64, 5003, device="cuda")
    start_T = torch.randint(0, 5003, (64,), device="cuda")
    end_T = (start_T + torch.randint(0, 5003, (64,), device="cuda")).clamp(max=5003)
    end_T[:4] = start_T[:4]  # empty
    end_T[4] = start_T[4] - 1  # empty too
    start_T[5], end_T[5] = 0, k  # exactly k
    start_T[6], end_T[6] = 1, k + 2  # one more, unaligned
    start_T[7], end_T[7] = -5, 9000  # beyond the row: cut to it
    assert_selects(scores_TS, start_T, end_T, k)


def test_causal_rows_select_only_the_past() -> None:
    scores_TS = torch.randn(3000, 3000, device="cuda")
    start_T = torch.zeros(3000, dtype=torch.int64, device="cuda")
    assert_selects(scores_TS, start_T, torch.arange(1, 3001, device="cuda"), 256)


def hostile_rows(num_keys: int) -> Tensor:
    """Return rows that each make another part of the search hard."""
    rows_TS = torch.randn(8, num_keys, device="cuda")
    rows_TS[1] = rows_TS[1].mul(3).round()  # ties at the cut
    rows_TS[2] = torch.arange(num_keys, device="cuda")  # the best are neighbours
    rows_TS[3] = rows_TS[3].where(rows_TS[3] > 2.5, -torch.inf)
    rows_TS[4] = torch.where(rows_TS[4] > 1, torch.nan, -1000 - rows_TS[4].abs())
    rows_TS[5] = rows_TS[5].sign() * 0.0  # both zeros, all equal
    rows_TS[6] = (1 + 1e-5 * rows_TS[6]) * 1e-40  # subnormal
    rows_TS[7] *= (20 * rows_TS[7]).exp()  # every exponent
    return rows_TS


@pytest.mark.parametrize("k", [*KEPT, 9000])
@pytest.mark.parametrize("num_keys", [1, 1000, 32768, 32769, 70001, 131072, 131073, 262144])
def test_clusters_select_what_a_stable_sort_selects(num_keys: int, k: int) -> None:
    scores_TS = hostile_rows(num_keys)
    start_T, end_T = full_range(scores_TS)
    for shorter in (0, 1, num_keys // 3):
        end_T[:] = num_keys - shorter
        got_TK = cuda.select_top_k_split_rows(scores_TS, end_T, k)
        expected_TK = expected_indices(scores_TS, start_T, end_T, k)
        assert torch.equal(got_TK.cpu(), expected_TK), f"{shorter} keys fewer"


def test_clusters_cut_ranges_to_the_row_and_leave_the_rest_alone() -> None:
    scores_TS = torch.randn(6, 5003, device="cuda")
    start_T = torch.zeros(6, dtype=torch.int64, device="cuda")
    end_T = torch.tensor([-3, 0, 64, 65, 5003, 99999], device="cuda")
    for row, end in enumerate(end_T.tolist()):
        scores_TS[row, max(end, 0) :] = torch.inf
    expected_TK = expected_indices(scores_TS, start_T, end_T, 64)
    assert torch.equal(cuda.select_top_k_split_rows(scores_TS, end_T, 64).cpu(), expected_TK)
    strided_TS = scores_TS.T.contiguous().T
    assert torch.equal(cuda.select_top_k_split_rows(strided_TS, end_T, 64).cpu(), expected_TK), (
        "strided"
    )


def test_clusters_repeat_their_bits_and_refuse_long_rows() -> None:
    scores_TS = torch.randn(40, 131072, device="cuda").mul(4).round()
    end_T = torch.full((40,), 131072, device="cuda")
    first_TK = cuda.select_top_k_split_rows(scores_TS, end_T, 2048)
    for _ in range(3):
        assert torch.equal(first_TK, cuda.select_top_k_split_rows(scores_TS, end_T, 2048)), (
            "differs"
        )
    with pytest.raises(ValueError, match="got rows of 262145 keys, expected at most 262144"):
        cuda.select_top_k_split_rows(torch.zeros(1, 262145, device="cuda"), end_T[:1], 2048)
    no_rows_TK = cuda.select_top_k_split_rows(scores_TS[:0], end_T[:0], 5)
    assert no_rows_TK.shape == (0, 5), "no rows"
    no_keys_TK = cuda.select_top_k_split_rows(scores_TS[:, :0], end_T, 5)
    assert (no_keys_TK == -1).all(), "no keys"


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_rows_may_begin_at_any_offset_and_stride(offset: int) -> None:
    wide = torch.randn(7, 4999, device="cuda")
    scores_TS = wide[::2, offset : offset + 4001]
    assert not scores_TS.is_contiguous(), "the case is about strided rows"
    assert_selects(scores_TS, *full_range(scores_TS), 333)


def test_transposed_and_repeated_rows_are_read_right() -> None:
    transposed_TS = torch.randn(1000, 6, device="cuda").T
    assert_selects(transposed_TS, *full_range(transposed_TS), 77)
    repeated_TS = torch.randn(1, 1000, device="cuda").expand(6, -1)
    assert_selects(repeated_TS, *full_range(repeated_TS), 77)


def test_rows_beyond_31_bits_of_offset_are_read_right() -> None:
    stride, num_rows = 1 << 20, 2060
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    storage = torch.zeros(num_rows, stride, device="cuda")
    storage[-2:] = torch.randn(2, stride, device="cuda")
    got_TK = cuda.select_top_k(storage, *full_range(storage), 2048)
    expected_TK = expected_indices(storage[-2:], *full_range(storage[-2:]), 2048)
    assert torch.equal(got_TK[-2:].cpu(), expected_TK), "last rows"
    assert torch.equal(got_TK[0].cpu(), torch.arange(2048, dtype=torch.int32)), "first row"


def test_no_rows_and_no_keys_are_fine() -> None:
    no_rows_TS = torch.empty(0, 10, device="cuda")
    assert cuda.select_top_k(no_rows_TS, *full_range(no_rows_TS), 3).shape == (0, 3), "no rows"
    no_keys_TS = torch.empty(4, 0, device="cuda")
    assert_selects(no_keys_TS, *full_range(no_keys_TS), 3)


def test_equals_the_eager_implementation() -> None:
    scores_TS = torch.randn(100, 1501, device="cuda", requires_grad=True)
    start_T = torch.arange(100, device="cuda")
    end_T = start_T + torch.arange(0, 1400, 14, device="cuda")
    eager_TK = select_top_k(scores_TS, start_T, end_T, 200, impl="eager")
    assert torch.equal(select_top_k(scores_TS, start_T, end_T, 200, impl="cuda"), eager_TK)


def test_two_calls_give_the_same_bits() -> None:
    scores_TS = torch.randn(512, 30011, device="cuda").mul(4).round()
    bounds = full_range(scores_TS)
    first_TK = cuda.select_top_k(scores_TS, *bounds, 2048)
    for _ in range(3):
        assert torch.equal(first_TK, cuda.select_top_k(scores_TS, *bounds, 2048)), "differs"


def test_refusals_name_the_tensor() -> None:
    scores_TS = torch.randn(3, 9, device="cuda")
    start_T, end_T = full_range(scores_TS)
    with pytest.raises(TypeError, match="scores_TS: got dtype float64"):
        cuda.select_top_k(scores_TS.double(), start_T, end_T, 2)
    with pytest.raises(ValueError, match="key_end_T: got shape .2,."):
        cuda.select_top_k(scores_TS, start_T, end_T[:2], 2)
    with pytest.raises(RuntimeError, match="key_start_T: got a tensor on cpu"):
        cuda.select_top_k(scores_TS, start_T.cpu(), end_T, 2)
    with pytest.raises(ValueError, match="k: got 0"):
        cuda.select_top_k(scores_TS, start_T, end_T, 0)


def test_the_registration_satisfies_torch() -> None:
    scores_TS = torch.randn(3, 99, device="cuda")
    operator = torch.ops.megatron_keye.select_top_k.default
    torch.library.opcheck(operator, (scores_TS, *full_range(scores_TS), 8))
    split_rows = torch.ops.megatron_keye.select_top_k_split_rows.default
    torch.library.opcheck(split_rows, (scores_TS, full_range(scores_TS)[1], 8))
