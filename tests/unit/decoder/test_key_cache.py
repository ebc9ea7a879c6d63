# SPDX-License-Identifier: Apache-2.0
"""What is written into pages is read back as it was, 8-bit indexer keys included."""

import pytest
import torch

from megatron_keye.decoder.key_cache import LayerCache
from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.indexer_quantization import round_to_fp8


@pytest.mark.parametrize("is_quantized", [False, True])
def test_pages_give_back_what_was_written(is_quantized: bool) -> None:
    heads = torch.full((5, 4, 2, 3, 8), torch.nan)
    index_keys = torch.full((5, 4, 8), torch.nan)
    layer = LayerCache(
        keys_PLGC=heads[:, :, 0],
        values_PLGC=heads[:, :, 1],
        index_keys_PLJ=index_keys.to(torch.float8_e4m3fn) if is_quantized else index_keys,
        index_scales_PL=torch.full((5, 4), torch.nan) if is_quantized else None,
    )
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(20, generator=generator)[:11]
    k, v = torch.randn(2, 11, 3, 8, generator=generator)
    index_key = round_to_fp8(torch.randn(11, 8, generator=generator))
    layer.write_heads(slots, k, v)
    layer.write_index_keys(slots, index_key)
    order = torch.randperm(11, generator=generator)
    read_k, read_v = layer.read_heads(slots[order], torch.float32)
    assert torch.equal(read_k, k[order]) and torch.equal(read_v, v[order])
    assert torch.equal(layer.read_index_keys(slots[order], torch.float32), index_key[order])
    assert int(layer.keys_PLGC.isnan().any(dim=-1).any(dim=-1).sum()) == 20 - 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pages_of_8_bits_give_back_what_was_rounded(dtype: torch.dtype) -> None:
    layer = LayerCache(
        keys_PLGC=torch.full((5, 4, 2, 3, 10), torch.nan).to(torch.float8_e4m3fn)[:, :, 0],
        values_PLGC=torch.full((5, 4, 2, 3, 10), torch.nan).to(torch.float8_e4m3fn)[:, :, 1],
        key_scales_PLG=torch.full((5, 4, 2, 3), torch.nan)[:, :, 0],
        value_scales_PLG=torch.full((5, 4, 2, 3), torch.nan)[:, :, 1],
        index_keys_PLJ=torch.empty(5, 4, 8, dtype=dtype),
        index_scales_PL=None,
    )
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(20, generator=generator)[:11]
    k, v = torch.randn(2, 11, 3, 10, generator=generator, dtype=torch.float64).to(dtype)
    v *= 50  # so that scales of keys and values must not be mixed up
    layer.write_heads(slots, k, v)
    order = torch.randperm(11, generator=generator)
    heads = layer.read_heads(slots[order], dtype)
    rounded = layer.read_fp8_heads(slots[order])
    parts = zip(heads, rounded[::2], rounded[1::2], (k, v), strict=True)
    for read, values, scales, written in parts:
        wanted, wanted_scales = quantize_heads(written[order])
        assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8)), "values"
        assert torch.equal(scales, wanted_scales), "scales"
        assert torch.equal(read, dequantize_heads(wanted, wanted_scales, dtype)), "read"
        assert (read - written[order]).norm() < 0.04 * written.norm(), "near what was written"
    unwritten = layer.key_scales_PLG.isnan().any(dim=-1)
    assert int(unwritten.sum()) == 20 - 11, "nothing else is written"
