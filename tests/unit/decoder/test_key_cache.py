# SPDX-License-Identifier: Apache-2.0
"""What is written into pages is read back as it was, 8-bit indexer keys included."""

import pytest
import torch

from megatron_keye.decoder.key_cache import LayerCache
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
    read_k, read_v = layer.read_heads(slots[order])
    assert torch.equal(read_k, k[order]) and torch.equal(read_v, v[order])
    assert torch.equal(layer.read_index_keys(slots[order]), index_key[order])
    assert int(layer.keys_PLGC.isnan().any(dim=-1).any(dim=-1).sum()) == 20 - 11
