# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the operators, beside torch's dense attention in the same process.

    python -m pytest tests/kernels --benchmark [--benchmark-out FILE] [-k 131072]

Each case writes a JSON line. Useful FLOP count selected keys only; a backward pass counts 2.5
times its forward. Dense attention is torch SDPA's cuDNN backend, keys repeated for each head.
`local` selections share a union of about 8K keys among 16 neighbours at 128K, `uniform` ones none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_keye.kernels.dense_attention import dense_attention, dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.indexer_quantization import round_to_fp8
from megatron_keye.kernels.lightning_indexer import cuda, lightning_indexer
from megatron_keye.kernels.rotary import rotate
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import cuda as sparse_cuda
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss
from megatron_keye.kernels.union_lists import union_lists
from tests.support.benchmark import Recorder, gradients_of
from tests.support.numerics import make_selection

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]

HEADS, GROUPS, CHANNELS = 32, 4, 128
INDEXER_HEADS, INDEXER_CHANNELS = 16, 64
TOP_K = 2048
CROSSOVER = 32768
"""Tokens up to which docs/benchmarks says that dense attention is faster."""
SCALE = CHANNELS**-0.5
ROWS = [
    (8192, "local"),
    (16384, "local"),
    (32768, "local"),
    (131072, "local"),
    (131072, "uniform"),
    (262144, "local"),
]

ThreeTensors = tuple[Tensor, Tensor, Tensor]


@dataclass
class Row:
    """One causal row of random tokens, with what its cases share."""

    length: int
    heads: ThreeTensors
    indexer: ThreeTensors
    indices_TK: Tensor
    fields: dict[str, Any]
    dense: dict[str, float] = field(default_factory=dict)

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it may see."""
        return self.length * (self.length + 1) / 2

    @property
    def num_selected(self) -> int:
        """Pairs of a query and a key that it selected."""
        return int((self.indices_TK >= 0).sum())


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def row(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[Row]:
    """Make a row's inputs and time dense attention on them."""
    length, kind = request.param
    made = make_row(length, kind)
    time_dense(made, recorder)
    yield made
    del made
    torch.cuda.empty_cache()


def make_row(length: int, kind: str) -> Row:
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made.requires_grad_()

    indices_TK = make_selection(kind, length, length, TOP_K, seed=1).cuda()
    counts_B = union_lists(indices_TK, length).counts_B.double()
    sizes = {"T": length, "S": length, "H": HEADS, "G": GROUPS, "C": CHANNELS}
    sizes |= {"I": INDEXER_HEADS, "J": INDEXER_CHANNELS, "K": TOP_K}
    return Row(
        length=length,
        heads=(
            normal(length, HEADS, CHANNELS),
            normal(length, GROUPS, CHANNELS),
            normal(length, GROUPS, CHANNELS),
        ),
        indexer=(
            normal(length, INDEXER_HEADS, INDEXER_CHANNELS),
            normal(length, INDEXER_CHANNELS),
            normal(length, INDEXER_HEADS),
        ),
        indices_TK=indices_TK,
        fields={
            "shape": sizes,
            "dtype": "bfloat16",
            "selection": kind,
            "union_mean": round(float(counts_B.mean()), 1),
            "union_max": int(counts_B.max()),
        },
    )


def time_dense(row: Row, recorder: Recorder) -> None:
    flop = 4 * HEADS * CHANNELS * row.pairs
    q, k, v = (tensor.detach().transpose(0, 1)[None] for tensor in row.heads)
    k, v = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (k, v))
    inputs = tuple(tensor.requires_grad_() for tensor in (q.clone(), k, v))

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*inputs, is_causal=True)

    def time(op: str, run: Callable[[], object], flop: float) -> float:
        return recorder.time(op, "cudnn", run, fields=row.fields, flop=flop)

    backward = gradients_of(forward, inputs)
    row.dense["forward"] = time("dense_attention_forward", forward, flop)
    row.dense["backward"] = time("dense_attention_backward", backward, 2.5 * flop)


def time_beside_dense(
    recorder: Recorder,
    row: Row,
    op: str,
    run: Callable[[], object],
    *,
    flop: float,
    passes: tuple[str, ...] = ("forward",),
    impl: str = "triton",
) -> None:
    """Time a case and compare it with the same passes of dense attention."""
    peer = "cudnn dense " + " + ".join(passes), sum(row.dense[each] for each in passes)
    recorder.time(op, impl, run, fields=row.fields, flop=flop, peer=peer)


def causal(length: int) -> tuple[Tensor, Tensor]:
    end_T = torch.arange(1, length + 1, device="cuda")
    return torch.zeros_like(end_T), end_T


def select(row: Row, impl: str, indexer: ThreeTensors | None = None) -> Tensor:
    """Select with the row's indexer, or with another one, which is rounded to 8 bits."""
    is_rounded, inputs = indexer is not None, indexer or row.indexer
    ranges = causal(row.length)
    return lightning_indexer(*inputs, *ranges, TOP_K, is_rounded=is_rounded, impl=impl)


def takes_row(row: Row) -> bool:
    return cuda.unsupported_reason(*row.indexer[:2], TOP_K) is None


def fastest_indexer(row: Row) -> str:
    return "cuda" if cuda.suits(*row.indexer[:2], TOP_K) else "triton"


def attend(
    row: Row, *, with_target: bool, indices_TK: Tensor | None = None, impl: str = "triton"
) -> tuple[Tensor, Tensor | None]:
    if indices_TK is None:
        indices_TK = row.indices_TK
    return sparse_attention(
        *row.heads, indices_TK, scale=SCALE, with_target=with_target, impl=impl
    )


def lose(row: Row, target_TGK: Tensor, indices_TK: Tensor | None = None) -> Tensor:
    if indices_TK is None:
        indices_TK = row.indices_TK
    scores_TK = selected_indexer_scores(*row.indexer, indices_TK, impl="triton")
    return sparse_indexer_loss(scores_TK, target_TGK, impl="triton")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_lightning_indexer(row: Row, recorder: Recorder, impl: str) -> None:
    """Triton's scores are selected from by the extension where that is built."""
    if impl == "cuda" and (missing_reason("lightning_indexer") or not takes_row(row)):
        pytest.skip("the extension is not built, or not for this GPU")
    flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * row.pairs
    time_beside_dense(
        recorder, row, "lightning_indexer", lambda: select(row, impl), flop=flop, impl=impl
    )


def test_lightning_indexer_of_8_bits(row: Row, recorder: Recorder) -> None:
    """The time includes taking the rounded vectors apart."""
    if missing_reason("lightning_indexer") or not takes_row(row):
        pytest.skip("the extension is not built, or not for this GPU")
    q_TIJ, k_SJ, gate_TI = (each.detach() for each in row.indexer)
    rounded = round_to_fp8(q_TIJ), round_to_fp8(k_SJ), gate_TI
    flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * row.pairs
    time_beside_dense(
        recorder,
        row,
        "lightning_indexer",
        lambda: select(row, "cuda", rounded),
        flop=flop,
        impl="cuda, e4m3",
    )


def test_union_lists(row: Row, recorder: Recorder) -> None:
    def build() -> object:
        # A selection's lists are remembered with the tensor; another one is merged again.
        return union_lists(row.indices_TK.detach(), row.length)

    recorder.time("union_lists", "triton", build, fields=row.fields)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("with_target", [False, True])
def test_sparse_attention_forward(
    row: Row, recorder: Recorder, with_target: bool, impl: str
) -> None:
    if impl == "cuda" and not sparse_cuda.suits(*row.heads[:2], SCALE):
        pytest.skip("the extension is not built, or not for this GPU")
    flop = (6 if with_target else 4) * HEADS * CHANNELS * row.num_selected
    op = "sparse_attention_with_target" if with_target else "sparse_attention_forward"
    with torch.no_grad():
        time_beside_dense(
            recorder,
            row,
            op,
            lambda: attend(row, with_target=with_target, impl=impl),
            flop=flop,
            impl=impl,
        )


@pytest.mark.parametrize("form", ["bulk", "pairs", "triton"])
def test_sparse_attention_backward(
    row: Row, recorder: Recorder, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impl = "triton" if form == "triton" else "cuda"
    if impl == "cuda" and not sparse_cuda.suits(*row.heads[:2], SCALE):
        pytest.skip("the extension is not built, or not for this GPU")
    monkeypatch.setattr(sparse_cuda, "BACKWARD", form)
    backward = gradients_of(lambda: attend(row, with_target=False, impl=impl)[0], row.heads)
    flop = 10 * HEADS * CHANNELS * row.num_selected
    op, name = "sparse_attention_backward", "triton" if impl == "triton" else f"cuda, {form}"
    time_beside_dense(recorder, row, op, backward, flop=flop, passes=("backward",), impl=name)


def test_sparse_indexer_loss(row: Row, recorder: Recorder) -> None:
    target_TGK = attend(row, with_target=True)[1]
    assert target_TGK is not None
    flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * row.num_selected
    forward = {"fields": row.fields, "flop": flop}
    recorder.time("indexer_loss_forward", "triton", lambda: lose(row, target_TGK), **forward)
    backward = gradients_of(lambda: lose(row, target_TGK), row.indexer)
    recorder.time("indexer_loss_backward", "triton", backward, fields=row.fields, flop=3 * flop)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_selected_indexer_scores_backward(row: Row, recorder: Recorder, impl: str) -> None:
    if impl == "cuda" and missing_reason("selected_indexer_scores_backward"):
        pytest.skip("the extension is not built, or not for this GPU")

    def score() -> Tensor:
        return selected_indexer_scores(*row.indexer, row.indices_TK, impl=impl)

    flop = 6 * INDEXER_HEADS * INDEXER_CHANNELS * row.num_selected
    backward, op = gradients_of(score, row.indexer), "selected_indexer_scores_backward"
    recorder.time(op, impl, backward, fields=row.fields, flop=flop)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_sparse_loss_beside_the_attention(row: Row, recorder: Recorder, impl: str) -> None:
    """Target, divergence and the scores' gradient, as the attention's backward pass makes them."""
    from megatron_keye.kernels.sparse_attention_with_loss import autograd, cuda

    if missing_reason("sparse_attention_loss") or not sparse_cuda.suits(*row.heads[:2], SCALE):
        pytest.skip("the extension is not built, or not for this GPU")
    lists = union_lists(row.indices_TK, row.length)
    with torch.no_grad():
        _, lse_TH = sparse_cuda.attend(*row.heads, lists, scale=SCALE)
        scores_TK = selected_indexer_scores(*row.indexer, row.indices_TK, impl="triton")
    heads = *(tensor.detach() for tensor in row.heads[:2]), lse_TH
    selected = scores_TK, torch.ones(row.length, device="cuda")

    def teach() -> object:
        if impl == "cuda":
            return cuda.compare(*heads, lists, *selected, scale=SCALE)
        return autograd.teach_in_parts(*heads, row.indices_TK, *selected, scale=SCALE)

    flop = 2 * HEADS * CHANNELS * row.num_selected
    recorder.time("sparse_loss_beside_attention", impl, teach, fields=row.fields, flop=flop)


@pytest.mark.parametrize("lse_given", [False, True])
def test_dense_indexer_loss(row: Row, recorder: Recorder, lse_given: bool) -> None:
    """The warm-up's loss with its gradients, which the forward pass makes.

    With "+lse" the attention's log-sum-exp is known, as the decoder hands it over.
    """
    query_THC, key_SGC, value_SGC = (tensor.detach() for tensor in row.heads)
    ranges = causal(row.length)
    lse_TH = dense_attention_with_lse(query_THC, key_SGC, value_SGC, *ranges, scale=SCALE)[1]
    weight_T = torch.ones(row.length, device="cuda")

    def loss() -> tuple[Tensor, ...]:
        total, _ = dense_indexer_loss(
            *row.indexer,
            query_THC,
            key_SGC,
            *ranges,
            weight_T,
            lse_TH if lse_given else None,
            scale=SCALE,
            impl="triton",
        )
        return torch.autograd.grad(total, row.indexer)

    scores_flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * row.pairs
    logits_flop = 2 * HEADS * CHANNELS * row.pairs
    # Scores twice, their products with dscores twice, and again for the mask of each.
    flop = (1 if lse_given else 2) * logits_flop + 6 * scores_flop
    impl = "triton+lse" if lse_given else "triton"
    time_beside_dense(recorder, row, "dense_indexer_loss", loss, flop=flop, impl=impl)


def test_dense_layer_up_to_the_crossover(row: Row, recorder: Recorder) -> None:
    """What a row of short documents runs with `training.dense_up_to` at the crossover."""
    if row.length > CROSSOVER:
        pytest.skip(f"rows above {CROSSOVER} tokens attend sparsely")

    ranges = causal(row.length)

    def layer() -> tuple[Tensor, ...]:
        out_THC = dense_attention(*row.heads, *ranges, scale=SCALE, impl="sdpa")
        return torch.autograd.grad(out_THC, row.heads, torch.ones_like(out_THC))

    flop = 14 * HEADS * CHANNELS * row.pairs
    both = ("forward", "backward")
    time_beside_dense(recorder, row, "dense_layer", layer, flop=flop, passes=both, impl="sdpa")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("target", ["in parts", "whole", "not stored"])
def test_whole_layer(
    row: Row, recorder: Recorder, target: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Select, attend, lose and both backward passes, as the decoder does without its linears.

    Its target exists in parts, in the backward pass, or nowhere; "whole" is the plain form.
    """
    from megatron_keye.kernels.sparse_attention_with_loss import cuda as cuda_loss

    if impl == "cuda" and not sparse_cuda.suits(*row.heads[:2], SCALE):
        pytest.skip("the extension is not built, or not for this GPU")
    if target == "not stored" and (impl == "triton" or missing_reason("sparse_attention_loss")):
        pytest.skip("impl 'triton' stores it, and so does an extension without the loss")
    monkeypatch.setattr(cuda_loss, "LOSS", "cuda" if target == "not stored" else "triton")
    indexer = fastest_indexer(row)
    weight_T = torch.ones(row.length, device="cuda")

    def layer() -> tuple[Tensor, ...]:
        select(row, indexer)
        # Random tokens have no locality, so the named selection goes on; its unions, merged anew.
        indices_TK = row.indices_TK.detach()
        if target == "whole":
            out_THC, target_TGK = attend(row, with_target=True, indices_TK=indices_TK, impl=impl)
            assert target_TGK is not None
            loss = lose(row, target_TGK, indices_TK).sum()
        else:
            out_THC, loss = sparse_attention_with_loss(
                *row.heads,
                indices_TK,
                selected_indexer_scores(*row.indexer, indices_TK, impl="triton"),
                weight_T,
                lambda kl_TG: None,
                scale=SCALE,
                impl=impl,
            )
        outputs = out_THC, loss
        grads = tuple(torch.ones_like(output) for output in outputs)
        return torch.autograd.grad(outputs, (*row.heads, *row.indexer), grads)

    flop = (14 * HEADS * CHANNELS + 8 * INDEXER_HEADS * INDEXER_CHANNELS) * row.num_selected
    both = ("forward", "backward")
    name = impl + {"in parts": "", "whole": "+target", "not stored": "+loss"}[target]
    time_beside_dense(recorder, row, "sparse_layer", layer, flop=flop, passes=both, impl=name)


@pytest.mark.parametrize(
    ("length", "heads", "channels"), [(131072, HEADS, CHANNELS), (16384, 16, 72)]
)
def test_rotary(recorder: Recorder, length: int, heads: int, channels: int) -> None:
    """Queries of the decoder at 128K, and of a ViT's chunk."""
    x_THC = torch.randn(length, heads, channels, device="cuda", dtype=torch.bfloat16)
    x_THC.requires_grad_()
    angles_TC = torch.rand(length, channels // 2, device="cuda").repeat(1, 2)
    tables = angles_TC.cos(), angles_TC.sin()
    sizes = {"T": length, "S": length, "H": heads, "C": channels}
    fields = {"shape": sizes, "dtype": "bfloat16"}
    for op, wrap in (("rotary_forward", None), ("rotary_backward", gradients_of)):
        peer = None
        for impl in ("eager", "triton"):

            def forward(impl: str = impl) -> Tensor:
                return rotate(x_THC, *tables, impl=impl)

            run = forward if wrap is None else wrap(forward, (x_THC,))
            taken = recorder.time(op, impl, run, fields=fields, peer=peer)
            peer = ("eager", taken)
