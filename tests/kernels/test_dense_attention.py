# SPDX-License-Identifier: Apache-2.0
"""Tests of the attention over whole ranges."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.dense_attention import (
    dense_attention,
    dense_attention_with_lse,
    operators,
)
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.trapezoids import Trapezoid, find_trapezoids
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    document_ranges,
    gradients,
    loop_attention,
    make_tensor,
    odd_ranges,
    ranges_listed,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_GROUPS, NUM_HEADS, NUM_CHANNELS = 63, 100, 2, 6, 10
SCALE = 0.3


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_THC, k_SGC and v_SGC."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=1, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=2, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_output_equals_loops(dtype: torch.dtype, tolerance: float) -> None:
    inputs, ranges = make_inputs(dtype), odd_ranges(NUM_QUERIES, NUM_KEYS, seed=4)
    out_THC = dense_attention(*inputs, *ranges, scale=SCALE)
    assert out_THC.dtype == dtype, "output type"
    assert_close(out_THC, loop_attention(*inputs, ranges_listed(*ranges), SCALE)[0], tolerance)


def test_one_causal_document_equals_torch() -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    k_SGC, v_SGC = k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]
    out_THC = dense_attention(q_THC, k_SGC, v_SGC, *document_ranges(NUM_QUERIES), scale=SCALE)
    expected_HTC = functional.scaled_dot_product_attention(
        q_THC.transpose(0, 1),
        k_SGC.transpose(0, 1),
        v_SGC.transpose(0, 1),
        is_causal=True,
        scale=SCALE,
        enable_gqa=True,
    )
    assert_close(out_THC, expected_HTC.transpose(0, 1), 1e-12)


def test_sdpa_equals_eager_on_documents() -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    inputs = trainable((q_THC, k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]))
    for lengths in ((NUM_QUERIES,), (1, 20, 42)):
        ranges = document_ranges(*lengths)
        eager_THC = dense_attention(*inputs, *ranges, scale=SCALE, impl="eager")
        sdpa_THC = dense_attention(*inputs, *ranges, scale=SCALE, impl="sdpa")
        assert_close(sdpa_THC, eager_THC, 1e-12)
        for actual, expected in zip(
            gradients(sdpa_THC, *inputs), gradients(eager_THC, *inputs), strict=True
        ):
            assert_close(actual, expected, 1e-12)


def test_sdpa_copies_no_single_document(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, made = operators.attend, list[Tensor]()

    def attend_and_show(*heads: Any, **options: Any) -> Any:
        *tensors, state = attend(*heads, **options)
        made.extend(tensors)
        return *tensors, state

    monkeypatch.setattr(operators, "attend", attend_and_show)
    q_THC, k_SGC, v_SGC = make_inputs()
    heads, ranges = (q_THC, k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]), document_ranges(NUM_QUERIES)
    returned = dense_attention_with_lse(*heads, *ranges, scale=SCALE, impl="sdpa")
    assert [t.data_ptr() for t in returned] == [t.data_ptr() for t in made], "out and lse"
    assert returned[0].is_contiguous(), "the next layer flattens heads without a copy"


@pytest.mark.parametrize("lengths", [(NUM_QUERIES,), (1, 20, 42)])
def test_a_second_call_takes_the_outputs_of_the_first(lengths: tuple[int, ...]) -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    inputs, ranges = (q_THC, k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]), document_ranges(*lengths)
    options: dict[str, Any] = {"scale": SCALE, "impl": "sdpa"}
    plain = trainable(tuple(tensor.clone() for tensor in inputs))
    expected, expected_lse_TH = dense_attention_with_lse(*plain, *ranges, **options)
    kept = KeptOutputs()
    with torch.no_grad():
        first_THC, _ = dense_attention_with_lse(*inputs, *ranges, kept=kept, **options)
    kept.begin_second_call()
    again = trainable(tuple(tensor.clone() for tensor in inputs))
    out_THC, lse_TH = dense_attention_with_lse(*again, *ranges, kept=kept, **options)
    if len(lengths) == 1:
        assert out_THC.data_ptr() == first_THC.data_ptr(), "computed again"
    assert torch.equal(out_THC, expected) and torch.equal(lse_TH, expected_lse_TH)
    pairs = zip(gradients(out_THC, *again), gradients(expected, *plain), strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "gradients"
    with pytest.raises(IndexError):
        dense_attention_with_lse(*again, *ranges, kept=kept, **options)


def loop_lse(q_THC: Tensor, k_SGC: Tensor, ranges: tuple[Tensor, Tensor]) -> Tensor:
    """Return lse_TH, a query and a head at a time."""
    lse_TH = torch.full(q_THC.shape[:2], torch.inf, dtype=q_THC.dtype)
    per_group = q_THC.shape[1] // k_SGC.shape[1]
    for query, keys in enumerate(ranges_listed(*ranges)):
        for head in range(q_THC.shape[1] if keys else 0):
            logits_S = SCALE * k_SGC[keys, head // per_group] @ q_THC[query, head]
            lse_TH[query, head] = logits_S.exp().sum().log()
    return lse_TH


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4)]
)
def test_lse_equals_loops(dtype: torch.dtype, tolerance: float) -> None:
    q_THC, k_SGC, v_SGC = make_inputs(dtype)
    odd = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=9)
    out_THC, lse_TH = dense_attention_with_lse(
        q_THC.requires_grad_(), k_SGC, v_SGC, *odd, scale=SCALE
    )
    assert lse_TH.dtype == torch.promote_types(dtype, torch.float32), "type"
    assert out_THC.requires_grad and not lse_TH.requires_grad, "the output alone has gradients"
    q_THC = q_THC.detach()
    wanted_TH = loop_lse(q_THC.double(), k_SGC.double(), odd)
    is_empty_T = odd[0] >= odd[1]
    assert is_empty_T.any() and (lse_TH[is_empty_T] == torch.inf).all(), "+inf without keys"
    assert_close(lse_TH[~is_empty_T], wanted_TH[~is_empty_T], tolerance)
    k_SGC, v_SGC = k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]
    for lengths in ((NUM_QUERIES,), (1, 20, 42)):
        ranges = document_ranges(*lengths)
        _, lse_TH = dense_attention_with_lse(
            q_THC, k_SGC, v_SGC, *ranges, scale=SCALE, impl="sdpa"
        )
        assert lse_TH.dtype == torch.promote_types(dtype, torch.float32), "type of sdpa"
        assert_close(lse_TH, loop_lse(q_THC.double(), k_SGC.double(), ranges), tolerance)


def assert_a_gpus_operators_equal_eager(
    num_queries: int, num_keys: int, ranges: tuple[Tensor, Tensor]
) -> None:
    """Compare bf16 through torch's operators with float32 through the reference."""
    shapes = [(num_queries, 8, 128), (num_keys, 2, 128), (num_keys, 2, 128)]
    inputs = trainable(
        tuple(
            make_tensor(*shape, seed=seed, dtype=torch.bfloat16).cuda()
            for seed, shape in enumerate(shapes)
        )
    )
    on_gpu = tuple(bound.cuda() for bound in ranges)
    got, wanted = (
        dense_attention_with_lse(*tensors, *on_gpu, scale=128**-0.5, impl=impl)
        for tensors, impl in ((inputs, None), ([t.float() for t in inputs], "eager"))
    )
    assert got[0].is_contiguous(), "the next layer flattens heads without a copy"
    assert_close(got[0].float(), wanted[0], 2e-2)
    assert_close(got[1], wanted[1], 1e-4)
    for actual, expected in zip(
        gradients(got[0], *inputs), gradients(wanted[0], *inputs), strict=True
    ):
        assert_norm_close(actual, expected, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [(1, 127, 400), (4097,), (4500, 30, 4200)])
def test_a_gpus_operators_equal_eager_on_documents(lengths: tuple[int, ...]) -> None:
    """Documents on both sides of where cuDNN begins, of lengths that no tile divides."""
    length = sum(lengths)
    assert_a_gpus_operators_equal_eager(length, length, document_ranges(*lengths))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lengths", [(1000, 24), (18_000,), (700, 16_000, 1300)])
def test_a_gpus_operators_equal_eager_on_a_context_ranks_queries(
    rank: int, lengths: tuple[int, ...]
) -> None:
    start_S, end_S = document_ranges(*lengths)
    order_T = torch.arange(sum(lengths)).view(4, -1)[[rank, 3 - rank]].flatten()
    ranges = start_S[order_T], end_S[order_T]
    assert_a_gpus_operators_equal_eager(len(order_T), sum(lengths), ranges)


TORCHS_REFUSAL = RuntimeError(
    "cuDNN version incompatibility: PyTorch was compiled  against (9, 19, 0) but found runtime "
    "version (9, 14, 0). PyTorch already comes bundled with cuDNN. One option to resolving this"
)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (91_501, ""),
        (91_900, ""),
        (91_500, "got cuDNN 91500, expected 91501 or later"),
        (None, "torch has no cuDNN"),
        (TORCHS_REFUSAL, "against (9, 19, 0) but found runtime version (9, 14, 0)"),
    ],
    ids=["first right", "later", "wrong results", "none", "older library loaded"],
)
def test_cudnn_runs_only_where_it_is_there_and_right(
    found: int | RuntimeError | None, fault: str
) -> None:
    assert fault in operators.cudnn_fault(found) and bool(fault) == bool(
        operators.cudnn_fault(found)
    )


@pytest.fixture
def refused_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch refuse its cuDNN when asked first, and then give a version, as it does."""
    answers: list[Any] = [TORCHS_REFUSAL]

    def version() -> int:
        if answers:
            raise answers.pop()
        return 91_900

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    operators._cudnn_fault.cache_clear()
    yield
    operators._cudnn_fault.cache_clear()


def test_a_refused_cudnn_is_asked_and_reported_once(
    refused_cudnn: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert operators._cudnn_fault() and operators._cudnn_fault() == operators.cudnn_fault(
        TORCHS_REFUSAL
    )
    assert [record.message for record in caplog.records] == [
        f"dense_attention: FlashAttention runs in place of cuDNN: {operators._cudnn_fault()}"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flash_attention_takes_long_rows_where_cudnn_is_refused(refused_cudnn: None) -> None:
    shapes = ((4096, 4, 64), (4096, 2, 64), (4096, 2, 64))
    inputs = [make_tensor(*s, seed=i, dtype=torch.bfloat16).cuda() for i, s in enumerate(shapes)]
    ranges = tuple(bound.cuda() for bound in document_ranges(4096))
    got = dense_attention(*inputs, *ranges, scale=SCALE, impl="sdpa")
    expected = dense_attention(*inputs, *ranges, scale=SCALE, impl="eager")
    assert_close(got.float(), expected.float(), 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sdpa_refuses_what_no_operator_takes() -> None:
    q_THC, k_SGC, v_SGC = (tensor.cuda().float() for tensor in make_inputs())
    same = q_THC, k_SGC[:NUM_QUERIES], v_SGC[:NUM_QUERIES]
    ranges = tuple(bound.cuda() for bound in document_ranges(NUM_QUERIES))
    with pytest.raises(ValueError, match="neither cuDNN nor FlashAttention takes"):
        dense_attention(*same, *ranges, scale=SCALE, impl="sdpa")
    eager_THC = dense_attention(*same, *ranges, scale=SCALE, impl="eager")
    assert torch.equal(dense_attention(*same, *ranges, scale=SCALE), eager_THC), "the default"


def zigzag_ranges(rank: int) -> tuple[Tensor, Tensor]:
    """Return the ranges of a context rank's queries: two of eight parts of a row of documents."""
    start_S, end_S = document_ranges(20, 40, 28)
    parts = torch.arange(NUM_KEYS - 12).view(8, -1)
    order_T = parts[[rank, 7 - rank]].flatten()
    return start_S[order_T], end_S[order_T]


@pytest.mark.parametrize("rank", range(4))
def test_sdpa_equals_eager_on_a_context_ranks_queries(rank: int) -> None:
    ranges = zigzag_ranges(rank)
    inputs = trainable((make_inputs()[0][: len(ranges[0])], *make_inputs()[1:]))
    eager, sdpa = (
        dense_attention_with_lse(*inputs, *ranges, scale=SCALE, impl=impl)
        for impl in ("eager", "sdpa")
    )
    for actual, expected in zip(sdpa, eager, strict=True):
        assert_close(actual, expected, 1e-12)
    for actual, expected in zip(
        gradients(sdpa[0], *inputs), gradients(eager[0], *inputs), strict=True
    ):
        assert_close(actual, expected, 1e-12)


def test_sdpa_equals_eager_on_any_ranges() -> None:
    inputs = trainable(make_inputs())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=8)
    assert (ranges[0] >= ranges[1]).any(), "queries without keys belong to the test"
    eager, sdpa = (
        dense_attention_with_lse(*inputs, *ranges, scale=SCALE, impl=impl)
        for impl in ("eager", "sdpa")
    )
    assert_close(sdpa[0], eager[0], 1e-12)
    assert torch.equal(sdpa[1].isinf(), eager[1].isinf())
    for actual, expected in zip(
        gradients(sdpa[0], *inputs), gradients(eager[0], *inputs), strict=True
    ):
        assert_close(actual, expected, 1e-12)


def test_few_trapezoids_cover_a_row() -> None:
    assert find_trapezoids(*document_ranges(20, 43)) == [
        Trapezoid(0, 20, 0, 0),
        Trapezoid(20, 43, 20, 0),
    ]
    # The first part of rank 1 lies in two documents, its second one in the last.
    assert find_trapezoids(*zigzag_ranges(1)) == [
        Trapezoid(0, 9, 0, 11),
        Trapezoid(9, 2, 20, 0),
        Trapezoid(11, 11, 60, 6),
    ]
    start_T, end_T = (torch.tensor(bounds) for bounds in ([3, 3, 0, 7], [4, 5, 0, 2]))
    assert find_trapezoids(start_T, end_T) == [Trapezoid(0, 2, 3, 0), Trapezoid(2, 2, 0, -1)]


def test_gradients_equal_finite_differences() -> None:
    shapes = [(5, 6, 3), (7, 2, 3), (7, 2, 3)]
    inputs = [make_tensor(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    start_T, end_T = torch.tensor([0, 2, 3, 0, 6]), torch.tensor([7, 5, 3, 1, 7])

    def output(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> Tensor:
        return dense_attention(q_THC, k_SGC, v_SGC, start_T, end_T, scale=SCALE)

    assert torch.autograd.gradcheck(output, inputs, fast_mode=True), "dense attention"


def test_rows_without_keys_give_zero() -> None:
    inputs = trainable(make_inputs())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=5)
    out_THC = dense_attention(*inputs, *ranges, scale=SCALE)
    is_empty_T = ranges[0] >= ranges[1]
    assert is_empty_T.any() and not out_THC[is_empty_T].any(), "zero output"
    dq_THC, dk_SGC, dv_SGC = gradients(out_THC, *inputs)
    assert not dq_THC[is_empty_T].any(), "zero gradient"
    assert dk_SGC.isfinite().all() and dv_SGC.isfinite().all(), "finite gradients"


def test_packed_documents_do_not_see_each_other() -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    ranges = document_ranges(20, 43)
    out_THC = dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=SCALE)
    second = q_THC[20:], k_SGC[20:63], v_SGC[20:63]
    assert_close(out_THC[20:], dense_attention(*second, *document_ranges(43), scale=SCALE), 1e-13)
    k_SGC[20:], v_SGC[20:] = 1e3, -1e3
    changed_THC = dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=SCALE)
    assert torch.equal(changed_THC[:20], out_THC[:20]), (
        "the first document after the second's change"
    )


def test_results_are_invariant_to_chunks_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    q_THC, k_SGC, v_SGC = trainable(make_inputs())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=6)

    def everything(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out_THC = dense_attention(q, k, v, *ranges, scale=SCALE)
        return [out_THC, *gradients(out_THC, q_THC, k_SGC, v_SGC)]

    whole = everything(q_THC, k_SGC, v_SGC)
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 100_000)
    transposed = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (q_THC, k_SGC, v_SGC)]
    for actual, expected in zip(everything(*transposed), whole, strict=True):
        assert_close(actual, expected, 1e-13)


def test_a_misfit_is_named() -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=7)
    with pytest.raises(ValueError, match="k_SGC: got C = 9"):
        dense_attention(q_THC, k_SGC[..., :9], v_SGC, *ranges, scale=SCALE)
    with pytest.raises(ValueError, match="got H = 5"):
        dense_attention(q_THC[:, :5], k_SGC, v_SGC, *ranges, scale=SCALE)
    with pytest.raises(ValueError, match="impl = 'cuda', expected one of eager"):
        dense_attention(q_THC, k_SGC, v_SGC, *ranges, scale=SCALE, impl="cuda")
