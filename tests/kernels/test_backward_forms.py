"""The forms in which backward passes over unions can run: the same results, and their times.

    python -m pytest tests/kernels/test_backward_forms.py --benchmark --benchmark-out FILE

times each form of the attention's and of the selected scores' backward pass, at 128K and 256K
tokens, and of the attention's with the target and without it, beside the kernel that gathers it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.union_lists import UnionLists, union_lists
from tests.support.benchmark import Recorder
from tests.support.numerics import (
    assert_norm_close,
    device,
    make_selection,
    odd_selection,
    trainable,
)

WIDE = Blocks(rows=128, keys=32, warps=8, stages=3, registers=128)
ATTENTION_FORMS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "3 stages": {"blocks": WIDE},
    "sums by group": {"blocks": WIDE._replace(stages=2), "sums_by_group": True},
    "3 stages, sums by group": {"blocks": WIDE, "sums_by_group": True},
    "64 keys, one program": {"blocks": Blocks(128, 64, 8, 2), "sums_by_group": True},
    "4 warps": {"blocks": Blocks(128, 32, 4, 3), "sums_by_group": True},
    "two passes": {"blocks": WIDE, "key_blocks": WIDE, "sums_by_group": True},
}
BOTH_WAYS = ("tuned", "3 stages, sums by group")
"""Those that are timed without the target too."""
SCORE_FORMS: dict[str, Blocks | None] = {
    "tuned": None,
    "3 stages": Blocks(128, 64, 8, 3, 128),
    "256 rows": Blocks(256, 64, 8, 2),
    "256 rows, 16 warps": Blocks(256, 64, 16, 2, 128),
    "256 rows, 16 warps, 3 stages": Blocks(256, 64, 16, 3, 128),
    "4 warps": Blocks(128, 64, 4, 3),
}
ROWS = [(131072, "local"), (131072, "uniform"), (262144, "local"), (262144, "uniform")]
HEADS, GROUPS, CHANNELS, INDEXER_HEADS, INDEXER_CHANNELS, TOP_K = 32, 4, 128, 16, 64, 2048
SCALE = CHANNELS**-0.5
ON_GPU = torch.cuda.is_available()


class Case(NamedTuple):
    """A row's selection with operands of both passes."""

    indices_TK: Tensor
    heads: tuple[Tensor, Tensor, Tensor]
    indexer: tuple[Tensor, Tensor, Tensor]


def make_case(indices_TK: Tensor, num_keys: int, sizes: tuple[int, ...]) -> Case:
    """Return a case in bfloat16 on a GPU, in float32 on a CPU."""
    heads, groups, channels, indexer_heads, indexer_channels = sizes
    num_queries, dtype = len(indices_TK), torch.bfloat16 if ON_GPU else torch.float32
    shapes = [(num_queries, heads, channels), (num_keys, groups, channels)]
    shapes += [shapes[1], (num_queries, indexer_heads, indexer_channels)]
    shapes += [(num_keys, indexer_channels), (num_queries, indexer_heads)]
    generator = torch.Generator(device("triton")).manual_seed(1)
    options = {"generator": generator, "device": device("triton"), "dtype": dtype}
    q, k, v, iq, ik, gate = (torch.randn(*shape, **options) for shape in shapes)
    return Case(indices_TK.to(q.device), (q, k, v), (iq, ik, gate))


def backward(case: Case, lists: UnionLists, num_selected: int, form: dict[str, Any]) -> Any:
    """Return a function that runs the attention's backward pass in a form."""
    from megatron_keye.kernels.sparse_attention.triton import attend
    from megatron_keye.kernels.sparse_attention.triton_backward import (
        BackwardForm,
        attend_backward,
    )

    out_THC, lse_TH = attend(*case.heads, lists, scale=SCALE)
    dout_THC = make_dout(out_THC)
    chosen = BackwardForm(**form) if form else None
    return lambda: attend_backward(
        dout_THC,
        *case.heads,
        out_THC,
        lse_TH,
        lists,
        scale=SCALE,
        is_deterministic=False,
        num_selected=num_selected,
        form=chosen,
    )


def make_dout(out_THC: Tensor) -> Tensor:
    generator = torch.Generator(out_THC.device).manual_seed(2)
    like = {"device": out_THC.device, "dtype": out_THC.dtype}
    return torch.randn(out_THC.shape, generator=generator, **like)


@pytest.fixture(scope="module")
def small() -> tuple[Case, list[Tensor], list[Tensor]]:
    """Return a small case and its gradients in float64: with the target, and of the scores."""
    if ON_GPU:
        sizes: tuple[int, ...] = HEADS, GROUPS, CHANNELS, INDEXER_HEADS, INDEXER_CHANNELS
        # Multiples of 16, like long rows, so that both run the same compiled kernels.
        case = make_case(make_selection("local", 528, 8192, TOP_K, seed=4), 8192, sizes)
    else:
        case = make_case(odd_selection(18, 50, 9, seed=4), 50, (8, 2, 16, 2, 16))
    heads = trainable(tuple(each.double() for each in case.heads))
    out_THC, target_TGK = sparse_attention(*heads, case.indices_TK, scale=SCALE, impl="eager")
    grads = torch.autograd.grad(out_THC, heads, make_dout(out_THC.to(case.heads[0])).double())
    indexer = trainable(tuple(each.double() for each in case.indexer))
    scores_TK = selected_indexer_scores(*indexer, case.indices_TK, impl="eager")
    is_real_TK = scores_TK.isfinite()
    return (
        case,
        [*grads, target_TGK],
        list(torch.autograd.grad(scores_TK[is_real_TK].sum(), indexer)),
    )


@pytest.mark.parametrize("form", ATTENTION_FORMS.values(), ids=ATTENTION_FORMS)
def test_every_form_of_the_attention_gives_the_same_gradients(
    small: tuple[Case, list[Tensor], list[Tensor]], form: dict[str, Any]
) -> None:
    case, expected, _ = small
    lists = union_lists(case.indices_TK, len(case.heads[1]), impl="triton")
    got = backward(case, lists, case.indices_TK.shape[1], form)()
    for actual, wanted in zip(got[:3], expected[:3], strict=True):
        assert_norm_close(actual, wanted, 2.0**-7 if ON_GPU else 1e-5)
    is_real_T1K = (case.indices_TK >= 0)[:, None]
    target_TGK = got.target_TGK.where(is_real_T1K, torch.zeros_like(got.target_TGK))
    assert_norm_close(target_TGK, expected[3], 1e-4 if ON_GPU else 1e-5)


@pytest.mark.parametrize("blocks", SCORE_FORMS.values(), ids=SCORE_FORMS)
def test_every_form_of_the_scores_gives_the_same_gradients(
    small: tuple[Case, list[Tensor], list[Tensor]], blocks: Blocks | None
) -> None:
    from megatron_keye.kernels.selected_indexer_scores.triton import score_selected_backward

    case, _, expected = small
    lists = union_lists(case.indices_TK, len(case.indexer[1]), impl="triton")
    ones_TK = torch.ones(case.indices_TK.shape, device=case.indices_TK.device)
    got = score_selected_backward(ones_TK, *case.indexer, lists, blocks=blocks)
    for actual, wanted in zip(got, expected, strict=True):
        assert_norm_close(actual, wanted, 2.0**-7 if ON_GPU else 1e-5)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def long(request: pytest.FixtureRequest) -> Iterator[tuple[Case, UnionLists, dict[str, Any]]]:
    """Make a long row with its unions."""
    length, kind = request.param
    sizes = HEADS, GROUPS, CHANNELS, INDEXER_HEADS, INDEXER_CHANNELS
    case = make_case(make_selection(kind, length, length, TOP_K, seed=1), length, sizes)
    lists = union_lists(case.indices_TK, length)
    letters = {"T": length, "S": length, "H": HEADS, "G": GROUPS, "C": CHANNELS, "K": TOP_K}
    mean = round(float(lists.counts_B.double().mean()), 1)
    fields = {"shape": letters, "dtype": "bfloat16", "selection": kind, "union_mean": mean}
    yield case, lists, fields
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.benchmark
def test_attention_forms(
    long: tuple[Case, UnionLists, dict[str, Any]], recorder: Recorder
) -> None:
    from megatron_keye.kernels.sparse_attention.triton import attend
    from megatron_keye.kernels.sparse_attention.triton_target import recover_target

    case, lists, fields = long
    flop = 10 * HEADS * CHANNELS * int((case.indices_TK >= 0).sum())
    peer = None
    repeats = 1 if len(case.indices_TK) > 200_000 else 2
    for name, form in ATTENTION_FORMS.items():
        for num_selected in (0, TOP_K) if name in BOTH_WAYS else (TOP_K,):
            run = backward(case, lists, num_selected, form)
            op = "attention_backward" + ("_with_target" if num_selected else "")
            timed: dict[str, Any] = {"fields": fields, "flop": flop, "repeats": repeats}
            taken = recorder.time(op, name, run, peer=peer, **timed)
            peer = peer or ("tuned, no target", taken)
    _, lse_TH = attend(*case.heads, lists, scale=SCALE)

    def gather() -> object:
        return recover_target(*case.heads[:2], lse_TH, case.indices_TK, scale=SCALE)

    recorder.time("target", "gathered", gather, fields=fields, repeats=repeats)


@pytest.mark.gpu
@pytest.mark.benchmark
def test_score_forms(long: tuple[Case, UnionLists, dict[str, Any]], recorder: Recorder) -> None:
    from megatron_keye.kernels.selected_indexer_scores.triton import score_selected_backward

    case, lists, fields = long
    dscores_TK = torch.randn(case.indices_TK.shape, device="cuda")
    flop = 6 * INDEXER_HEADS * INDEXER_CHANNELS * int((case.indices_TK >= 0).sum())
    peer = None
    for name, blocks in SCORE_FORMS.items():

        def run(blocks: Blocks | None = blocks) -> object:
            return score_selected_backward(dscores_TK, *case.indexer, lists, blocks=blocks)

        op = "selected_scores_backward"
        taken = recorder.time(op, name, run, fields=fields, flop=flop, peer=peer, repeats=3)
        peer = peer or ("tuned", taken)
