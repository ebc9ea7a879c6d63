# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the sparse decode, beside torch's dense attention over the same keys.

    python -m pytest tests/kernels/test_sparse_decode_speed.py --benchmark

New tokens of each sequence, in a CUDA graph, with a cold L2 cache, with indexer keys of 16 and of
8 bits. The peer is the fastest of torch SDPA's backends on a cache without pages. Shares are of
the time that the bytes take which each call has to read once, at the speed of a large copy.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.sparse_decode import cuda, sparse_decode
from tests.support.benchmark import Recorder, memory_bytes_per_second
from tests.support.decode_cases import Queries, Sizes, make_decode

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]

TOP_K, LENGTH = 2048, 131072
SCALE = 128**-0.5
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
CUTS = [cuda.Cut(groups, cluster) for groups in (1, 2, 4) for cluster in (1, 2, 4, 8)]


@pytest.fixture(scope="module")
def bytes_per_second() -> float:
    return memory_bytes_per_second()


class Case:
    """A batch of sequences of LENGTH keys, and the bytes that its parts read."""

    def __init__(self, batch: int, num_queries: int, *, is_quantized: bool) -> None:
        sizes = Sizes((LENGTH,) * batch, num_queries=num_queries, is_quantized=is_quantized)
        self.queries: Queries
        self.queries, self.cache = make_decode(sizes)
        num_rows = batch * num_queries
        self.score_bytes = batch * LENGTH * (64 + 4 if is_quantized else 128)
        self.attention_bytes = num_rows * TOP_K * sizes.groups * sizes.channels * 2 * 2
        name = "fp8 keys" if is_quantized else "bfloat16 keys"
        shape = {"B": batch, "T": num_queries, "S": LENGTH, "K": TOP_K}
        self.fields = {"shape": shape, "dtype": "bfloat16", "selection": name}

    def decode(self, impl: str) -> Callable[[], object]:
        return partial(sparse_decode, *self.queries, self.cache, TOP_K, scale=SCALE, impl=impl)


def implementations() -> list[str]:
    return ["triton"] if missing_reason("sparse_decode_scores") else ["triton", "cuda"]


@pytest.mark.parametrize(("batch", "num_queries"), [(1, 1), (8, 1), (32, 1), (64, 1), (32, 4)])
def test_sparse_decode(
    batch: int, num_queries: int, recorder: Recorder, bytes_per_second: float
) -> None:
    peer = None
    for is_quantized in (False, True):
        case = Case(batch, num_queries, is_quantized=is_quantized)
        if num_queries == 1 and batch in (1, 32) and peer is None:
            peer = time_dense(recorder, case)
        traffic = case.score_bytes + case.attention_bytes, bytes_per_second
        for impl in implementations():
            recorder.time(
                "decode",
                impl,
                case.decode(impl),
                fields=case.fields,
                traffic=traffic,
                peer=peer,
                in_graph=True,
            )


@pytest.mark.parametrize(("batch", "is_quantized"), [(1, True), (32, False), (32, True)])
def test_parts_of_the_sparse_decode(
    batch: int,
    is_quantized: bool,
    recorder: Recorder,
    bytes_per_second: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores, selection and attention apart, in Triton and CUDA, with each cut."""
    from megatron_keye.kernels.sparse_decode import triton, triton_scores, triton_select

    case = Case(batch, 1, is_quantized=is_quantized)
    (q_BTIJ, gate_BTI, query_BTHC), cache = case.queries, case.cache
    scored = triton_scores.score_pages(q_BTIJ, gate_BTI, cache, TOP_K)
    indices_TK = triton_select.select_from_parts(*scored, TOP_K)
    out_BTHC = torch.empty_like(query_BTHC)

    def time(op: str, impl: str, run: Callable[[], object], num_bytes: int) -> None:
        traffic = num_bytes, bytes_per_second
        recorder.time(op, impl, run, fields=case.fields, traffic=traffic, in_graph=True)

    score = partial(triton_scores.score_pages, q_BTIJ, gate_BTI, cache, TOP_K)
    time("decode_scores", "triton", score, case.score_bytes)
    select = partial(triton_select.select_from_parts, *scored, TOP_K)
    time("decode_selection", "cuda", select, scored[0].nbytes)
    attend = partial(triton._attend, query_BTHC, cache, indices_TK, out_BTHC, scale=SCALE)
    time("decode_attention", "triton", attend, case.attention_bytes)
    if "cuda" not in implementations():
        return
    score = partial(cuda.score_pages, q_BTIJ, gate_BTI, cache)
    time("decode_scores", "cuda", score, case.score_bytes)
    for cut in (None, *CUTS):
        monkeypatch.setattr(cuda, "CUT", cut)
        attend = partial(cuda.attend, query_BTHC, cache, indices_TK, scale=SCALE)
        name = "cuda" if cut is None else f"cuda, {cut.groups_of_block} groups x {cut.cluster}"
        time("decode_attention", name, attend, case.attention_bytes)


def time_dense(recorder: Recorder, case: Case) -> tuple[str, float]:
    """Return the fastest backend and its milliseconds."""
    query_BTHC, cache = case.queries[2], case.cache
    k_BGSC, v_BGSC = (
        pages.reshape(len(query_BTHC), LENGTH, *pages.shape[2:]).transpose(1, 2).contiguous()
        for pages in (cache.keys_PLGC, cache.values_PLGC)
    )
    took: dict[str, float] = {}
    for backend in BACKENDS:

        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query_BTHC.transpose(1, 2), k_BGSC, v_BGSC, enable_gqa=True, scale=SCALE
                )

        name = backend.name.split("_")[0].lower()
        took[name] = recorder.time("dense_decode", name, attend, fields=case.fields, in_graph=True)
    best = min(took, key=lambda name: took[name])
    return f"{best} dense decode", took[best]
