# SPDX-License-Identifier: Apache-2.0
"""The CUDA sparse attention gives what the Triton form and float64 give, on its own shapes.

What could go wrong is how rows, keys and mask bits lie in registers and shared memory, stages that
are filled or read too early, unions that end inside a tile, and a running maximum that grows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.sparse_attention import cuda, sparse_attention
from megatron_keye.kernels.union_lists import union_lists
from tests.support.numerics import (
    assert_norm_close,
    document_ranges,
    gradients,
    make_selection,
    make_tensor,
    odd_ranges,
    odd_selection,
    trainable,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        missing_reason("sparse_attention_forward") is not None,
        reason="megatron_keye._C is not built",
    ),
]

SCALE = 0.1
TOLERANCE = 2.0**-7
"""Of a row's norm; weights and values are rounded to 8 bits."""

Heads = tuple[Tensor, Tensor, Tensor]


def make_heads(
    num_queries: int, num_keys: int, groups: int = 2, heads: int = 8, channels: int = 128
) -> Heads:
    """Return q_THC, k_SGC and v_SGC on the GPU; `heads` are those of a group."""
    q_THC = make_tensor(num_queries, groups * heads, channels, seed=1, dtype=torch.bfloat16)
    k_SGC = make_tensor(num_keys, groups, channels, seed=2, dtype=torch.bfloat16)
    v_SGC = make_tensor(num_keys, groups, channels, seed=3, dtype=torch.bfloat16)
    return q_THC.cuda(), k_SGC.cuda(), v_SGC.cuda()


def assert_rows_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare each row of channels by the norm of its error; a row of zeros must be one."""
    error_TH = (actual.double() - expected.double()).norm(dim=-1)
    limit_TH = tolerance * expected.double().norm(dim=-1) + 1e-12
    wrong = (~(error_TH <= limit_TH)).nonzero().tolist()
    assert not wrong, f"{len(wrong)} rows differ, such as {wrong[:5]} (query, head)"


def assert_attends(heads: Heads, indices_TK: Tensor, scale: float = SCALE) -> None:
    """Compare the output with float64 and the log-sum-exp with its definition."""
    q_THC, k_SGC, v_SGC = heads
    indices_TK = indices_TK.cuda()
    exact = tuple(tensor.double() for tensor in heads)
    expected_THC, _ = sparse_attention(*exact, indices_TK, scale=scale, impl="eager")
    out_THC, lse_TH = cuda.attend(*heads, union_lists(indices_TK, len(k_SGC)), scale=scale)
    assert out_THC.dtype == torch.bfloat16 and out_THC.is_contiguous(), "output"
    assert_rows_close(out_THC, expected_THC, TOLERANCE)
    torch.testing.assert_close(
        lse_TH.double(), exact_lse(*exact[:2], indices_TK, scale), atol=1e-4, rtol=1e-5
    )


def exact_lse(q_THC: Tensor, k_SGC: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    """Return log2 of each row's sum of exponentials, +inf without any key, in chunks of rows."""
    rows = []
    for q, indices in zip(q_THC.split(64), indices_TK.split(64), strict=True):
        is_real = (indices >= 0) & (indices < len(k_SGC))
        k = k_SGC[torch.where(is_real, indices, 0).long()]
        q = q.unflatten(1, (k_SGC.shape[1], -1))
        logits = torch.einsum("tghc,tkgc->tghk", q, k) * scale
        logits = logits.masked_fill(~is_real[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1).flatten(1) * torch.tensor(2.0).log().reciprocal().item()
        rows.append(torch.where(is_real.any(1)[:, None], lse, torch.inf))
    return torch.cat(rows)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("heads", [4, 8, 16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "k"),
    # From one key and one tile to unions of many; ends of all kinds inside tiles.
    [(1, 1, 1), (16, 64, 5), (17, 65, 9), (33, 130, 64), (63, 1000, 40), (200, 5000, 333)],
)
def test_odd_selections(
    num_queries: int, num_keys: int, k: int, heads: int, channels: int
) -> None:
    inputs = make_heads(num_queries, num_keys, heads=heads, channels=channels)
    assert_attends(inputs, odd_selection(num_queries, num_keys, k, seed=4))


@pytest.mark.parametrize("kind", ["local", "uniform"])
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_the_models_size(kind: str, heads: int) -> None:
    inputs = make_heads(515, 8195, groups=4, heads=heads)
    assert_attends(inputs, make_selection(kind, 515, 8195, 2048, seed=4), scale=128**-0.5)


def test_every_row_of_a_causal_sequence() -> None:
    inputs = make_heads(3000, 3000)
    assert_attends(inputs, make_selection("local", 3000, 3000, 256, seed=5))


@pytest.mark.parametrize("lengths", [(700, 1001, 3), (1, 64, 65, 900, 17), (30,) * 40])
def test_packed_documents(lengths: tuple[int, ...]) -> None:
    length = sum(lengths)
    scores_TS = make_tensor(length, length, seed=6, dtype=torch.float32)
    assert_attends(
        make_heads(length, length), select_top_k(scores_TS, *document_ranges(*lengths), 100)
    )


def test_a_part_of_the_queries_as_under_context_parallelism() -> None:
    inputs = make_heads(400, 1600)
    scores_TS = make_tensor(400, 1600, seed=7, dtype=torch.float32)
    assert_attends(inputs, select_top_k(scores_TS, *odd_ranges(400, 1600, seed=8), 200))


@pytest.mark.parametrize("first_half", [range(8), range(8, 16)])
def test_half_of_the_queries_need_no_key_for_many_tiles(first_half: range) -> None:
    # What one warpgroup holds of the ring must not keep the other's tiles from coming.
    selected_TS = torch.zeros(16, 2000, dtype=torch.bool)
    selected_TS[list(first_half)] = torch.arange(2000).remainder(1850) < 150
    selected_TS[[i for i in range(16) if i not in first_half], 100:1900] = True
    keys_TK = torch.arange(2000, dtype=torch.int32).where(selected_TS, 2000).sort(dim=1).values
    assert_attends(make_heads(16, 2000), keys_TK.where(keys_TK < 2000, -1))


@pytest.mark.parametrize("num_keys", [64, 63, 65, 700])
def test_all_keys(num_keys: int) -> None:
    indices_TK = torch.arange(num_keys, dtype=torch.int32).expand(50, -1).contiguous()
    assert_attends(make_heads(50, num_keys), indices_TK)


def test_neither_queries_nor_keys_nor_selections() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 100)
    none_TK = torch.full((40, 7), -1, dtype=torch.int32)
    none_TK[:16:2, 0], none_TK[16::3, 0] = 100, -5  # also padding
    for q, k, v, indices_TK in (
        (q_THC, k_SGC, v_SGC, none_TK),
        (q_THC, k_SGC[:0], v_SGC[:0], none_TK),
        (q_THC, k_SGC, v_SGC, none_TK[:, :0]),
        (q_THC[:0], k_SGC, v_SGC, none_TK[:0]),
    ):
        lists = union_lists(indices_TK.cuda(), len(k))
        out_THC, lse_TH = cuda.attend(q, k, v, lists, scale=SCALE)
        assert out_THC.shape == q.shape and not out_THC.any(), "zeros"
        assert lse_TH.isposinf().all(), "no key"


def test_some_tiles_without_any_key() -> None:
    indices_TK = odd_selection(100, 400, 90, seed=9)
    indices_TK[:32] = indices_TK[64:80] = indices_TK[97:] = -1
    assert_attends(make_heads(100, 400), indices_TK)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_a_maximum_that_moves(order: str, scale: float) -> None:
    """Logits up to thousands: whoever scales late or by the wrong row overflows or loses all."""
    q_THC, k_SGC, v_SGC = make_heads(40, 1500)
    height_S = torch.linspace(0.01, 8, 1500, device="cuda")
    height_S = height_S if order == "rising" else height_S.flip(0)
    k_SGC = (k_SGC.float().abs() * height_S[:, None, None]).bfloat16()
    q_THC = (q_THC.float().abs() * torch.linspace(0.1, 1, 40, device="cuda")[:, None, None]).to(
        torch.bfloat16
    )
    assert_attends((q_THC, k_SGC, v_SGC), odd_selection(40, 1500, 900, seed=10), scale=scale)


def test_negative_logits_only() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 500)
    assert_attends((q_THC.abs(), -k_SGC.abs(), v_SGC), odd_selection(40, 500, 90, 11), scale=5.0)


def test_keys_not_selected_are_never_loaded() -> None:
    q_THC, k_SGC, v_SGC = make_heads(63, 300)
    k_SGC[0] = k_SGC[150:] = v_SGC[0] = v_SGC[150:] = torch.nan
    indices_TK = odd_selection(63, 149, 40, seed=12)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1).cuda()
    out_THC, lse_TH = cuda.attend(
        q_THC, k_SGC, v_SGC, union_lists(indices_TK, len(k_SGC)), scale=SCALE
    )
    assert out_THC.isfinite().all() and lse_TH[1:].isfinite().all(), "finite"


def test_views_of_any_alignment() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 300)
    indices_TK = odd_selection(40, 300, 90, seed=13)
    odd = tuple(torch.cat([t[..., :1], t], dim=2)[..., 1:] for t in (q_THC, k_SGC, v_SGC))
    assert_attends((odd[0], odd[1], odd[2]), indices_TK)
    both_SGC = torch.cat([k_SGC, v_SGC], dim=1)  # as one projection gives them
    wide_THC = torch.cat([q_THC, q_THC], dim=1)[:, 16:]
    assert_attends((wide_THC, both_SGC[:, :2], both_SGC[:, 2:]), indices_TK)


def test_two_calls_give_the_same_bits() -> None:
    inputs = make_heads(2000, 8000, groups=4)
    lists = union_lists(make_selection("uniform", 2000, 8000, 512, seed=14).cuda(), 8000)
    first_THC, first_TH = cuda.attend(*inputs, lists, scale=SCALE)
    for _ in range(5):
        out_THC, lse_TH = cuda.attend(*inputs, lists, scale=SCALE)
        assert torch.equal(out_THC, first_THC) and torch.equal(lse_TH, first_TH), "bits"


def test_target_and_gradients_equal_those_of_triton() -> None:
    inputs = trainable(make_heads(130, 900))
    indices_TK = odd_selection(130, 900, 120, seed=15).cuda()
    results = {}
    for impl in ("triton", "cuda"):
        out_THC, target_TGK = sparse_attention(
            *inputs, indices_TK, scale=SCALE, deterministic=True, impl=impl
        )
        results[impl] = target_TGK, *gradients(out_THC, *inputs)
    target_TGK, *grads = results["cuda"]
    expected_TGK, *expected = results["triton"]
    torch.testing.assert_close(target_TGK, expected_TGK, atol=1e-6, rtol=1e-4)
    for actual, wanted in zip(grads, expected, strict=True):
        # Not row by row: the queries' gradient is all rounding where a query selects one key.
        assert_norm_close(actual, wanted, 2 * TOLERANCE)


def test_a_second_call_takes_the_output_of_the_first() -> None:
    inputs = make_heads(60, 300)
    indices_TK = odd_selection(60, 300, 40, seed=16).cuda()
    options: dict[str, Any] = {"scale": SCALE, "impl": "cuda", "with_target": False}
    kept = KeptOutputs()
    first_THC, _ = sparse_attention(*inputs, indices_TK, kept=kept, **options)
    kept.begin_second_call()
    again_THC, _ = sparse_attention(*inputs, indices_TK, kept=kept, **options)
    assert again_THC.data_ptr() == first_THC.data_ptr(), "computed again"


def test_refusals_say_what_is_taken() -> None:
    q_THC, k_SGC, v_SGC = make_heads(4, 10)
    indices_TK = odd_selection(4, 10, 3, seed=17).cuda()

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = SCALE) -> None:
        sparse_attention(q, k, v, indices_TK, scale=scale, impl="cuda")

    with pytest.raises(ValueError, match=r"got torch.float32, expected torch.bfloat16"):
        attend(q_THC.float(), k_SGC.float(), v_SGC.float())
    with pytest.raises(ValueError, match="got C = 32, expected 64 or 128"):
        attend(q_THC[..., :32], k_SGC[..., :32], v_SGC[..., :32])
    with pytest.raises(ValueError, match="got H / G = 2, expected 4, 8 or 16"):
        attend(q_THC[:, :4], k_SGC, v_SGC)
    with pytest.raises(ValueError, match="got scale = -1.0, expected more than 0"):
        attend(q_THC, k_SGC, v_SGC, scale=-1.0)


def test_the_registration_satisfies_torch() -> None:
    q_THC, k_SGC, v_SGC = make_heads(20, 90)
    lists = union_lists(odd_selection(20, 90, 30, seed=18).cuda(), 90)
    operator = torch.ops.megatron_keye.sparse_attention_forward.default
    torch.library.opcheck(operator, (q_THC, k_SGC, v_SGC, *lists, SCALE))


def test_a_compiled_layer_runs_it() -> None:
    inputs = trainable(make_heads(50, 200))
    indices_TK = odd_selection(50, 200, 30, seed=19).cuda()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q * 2, k, v, indices_TK, scale=SCALE, impl="cuda")[0] * 3

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer)(*inputs), layer(*inputs))
