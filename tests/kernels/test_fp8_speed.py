# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of keys and values of 8 bits, beside bfloat16 in the same process.

    python -m pytest tests/kernels/test_fp8_speed.py --benchmark

A piece of a prompt, 16,384 queries over 131,072 keys, and a new token of each of several
sequences of that length. The peer is the same call over bfloat16 in the default implementation.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.sparse_attention import cuda, sparse_attention
from megatron_keye.kernels.sparse_attention_fp8 import sparse_attention_fp8
from megatron_keye.kernels.sparse_decode import sparse_decode
from tests.support.benchmark import Recorder
from tests.support.decode_cases import Sizes, make_decode, rounded_heads
from tests.support.numerics import make_selection

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]

HEADS, GROUPS, CHANNELS, TOP_K = 32, 4, 128, 2048
QUERIES, KEYS = 16_384, 131_072
SCALE = CHANNELS**-0.5


@pytest.mark.parametrize("kind", ["local", "uniform"])
def test_a_piece_of_a_prompt(kind: str, recorder: Recorder) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q_THC = normal(QUERIES, HEADS, CHANNELS)
    k_SGC, v_SGC = normal(KEYS, GROUPS, CHANNELS), normal(KEYS, GROUPS, CHANNELS)
    rounded = *quantize_heads(k_SGC), *quantize_heads(v_SGC)
    indices_TK = make_selection(kind, QUERIES, KEYS, TOP_K, seed=1).cuda()
    shape = {"T": QUERIES, "S": KEYS, "K": TOP_K}
    flop = 4 * HEADS * CHANNELS * float((indices_TK >= 0).sum())

    def time(op: str, keys: str, impl: str, run: Callable[[], object], flop: float = 0.0) -> float:
        fields = {"shape": shape, "dtype": keys, "selection": kind}
        return recorder.time(op, impl, run, fields=fields, flop=flop, peer=peer)

    peer: tuple[str, float] | None = None
    found = {}
    implementations = ["cuda", "triton"] if cuda.suits(q_THC, k_SGC, SCALE) else ["triton"]
    with torch.no_grad():
        for impl in implementations:
            run: Callable[[], object] = partial(
                sparse_attention,
                q_THC,
                k_SGC,
                v_SGC,
                indices_TK,
                scale=SCALE,
                with_target=False,
                impl=impl,
            )
            found[impl] = time("prefill_attention", "bfloat16", impl, run, flop)
        peer = "bfloat16", found[implementations[0]]
        for impl in implementations:
            run = partial(
                sparse_attention_fp8, q_THC, *rounded, indices_TK, scale=SCALE, impl=impl
            )
            time("prefill_attention", "e4m3", impl, run, flop)
        peer = None
        time("quantize_heads", "bfloat16", "triton", partial(quantize_heads, k_SGC))
        widen = partial(dequantize_heads, *rounded[:2], torch.bfloat16)
        time("dequantize_heads", "e4m3", "triton", widen)


@pytest.mark.parametrize("batch", [1, 32])
def test_a_new_token_of_each(batch: int, recorder: Recorder) -> None:
    queries, cache = make_decode(Sizes((KEYS,) * batch, is_quantized=True))
    shape, peer = {"B": batch, "T": 1, "S": KEYS, "K": TOP_K}, None
    for keys in ("bfloat16", "e4m3"):
        if keys == "e4m3":
            cache = rounded_heads(cache)
        run = partial(sparse_decode, *queries, cache, TOP_K, scale=SCALE, impl="triton")
        fields = {"shape": shape, "dtype": keys, "selection": "fp8 indexer keys"}
        took = recorder.time("decode", "triton", run, fields=fields, peer=peer, in_graph=True)
        peer = "bfloat16", took
