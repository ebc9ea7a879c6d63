# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the sparse decode, beside torch's dense attention over the same keys.

    python -m pytest tests/kernels/test_sparse_decode_speed.py --benchmark

One new token per sequence, in a CUDA graph, with a cold L2 cache, with indexer keys of 16 and of
8 bits. The peer is the fastest of torch SDPA's backends on a cache without pages.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_keye.kernels.indexer_quantization import quantize, round_to_fp8
from megatron_keye.kernels.sparse_decode import PagedCache, sparse_decode
from tests.support.benchmark import Recorder

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]

HEADS, GROUPS, CHANNELS = 32, 4, 128
INDEXER_HEADS, INDEXER_CHANNELS = 16, 64
TOP_K, LENGTH, PAGE = 2048, 131072, 64
SCALE = CHANNELS**-0.5
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@pytest.mark.parametrize("batch", [1, 32])
def test_sparse_decode(batch: int, recorder: Recorder) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    num_pages = batch * LENGTH // PAGE
    order = torch.randperm(num_pages, generator=generator, device="cuda")
    cache = PagedCache(
        keys_PLGC=normal(num_pages, PAGE, GROUPS, CHANNELS),
        values_PLGC=normal(num_pages, PAGE, GROUPS, CHANNELS),
        index_keys_PLJ=normal(num_pages, PAGE, INDEXER_CHANNELS),
        pages_BN=order.int().view(batch, -1),
        lengths_B=torch.full((batch,), LENGTH, device="cuda"),
    )
    queries = (
        normal(batch, 1, INDEXER_HEADS, INDEXER_CHANNELS),
        normal(batch, 1, INDEXER_HEADS),
        normal(batch, 1, HEADS, CHANNELS),
    )
    fields = {"shape": {"B": batch, "T": 1, "S": LENGTH, "K": TOP_K}, "dtype": "bfloat16"}
    peer = time_dense(recorder, queries[2], cache, fields)
    values_PLJ, scales_PL = quantize(cache.index_keys_PLJ)
    rounded = round_to_fp8(queries[0]), *queries[1:]
    narrow = cache._replace(index_keys_PLJ=values_PLJ, index_scales_PL=scales_PL)
    for name, given, held in (("bfloat16", queries, cache), ("fp8", rounded, narrow)):
        decode = partial(sparse_decode, *given, held, TOP_K, scale=SCALE, impl="triton")
        case = fields | {"selection": f"{name} keys"}
        with torch.no_grad():
            recorder.time("decode", "triton", decode, fields=case, peer=peer, in_graph=True)


def time_dense(
    recorder: Recorder, query_BTHC: Tensor, cache: PagedCache, fields: dict[str, object]
) -> tuple[str, float]:
    """Return the fastest backend and its milliseconds."""
    batch = len(query_BTHC)
    k_BGSC, v_BGSC = (
        pages.view(batch, LENGTH, GROUPS, CHANNELS).transpose(1, 2).contiguous()
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
        took[name] = recorder.time("dense_decode", name, attend, fields=fields, in_graph=True)
    best = min(took, key=lambda name: took[name])
    return f"{best} dense decode", took[best]
