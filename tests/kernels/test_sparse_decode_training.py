# SPDX-License-Identifier: Apache-2.0
"""The sparse decode scores and selects as the training's kernels do, bit for bit."""

import pytest
import torch

from megatron_keye.kernels.indexer_quantization import quantize, round_to_fp8
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.sparse_decode import PagedCache, sparse_decode
from tests.support.numerics import device, make_tensor

SCALE = 0.3


def assert_decodes_as_trained(
    sizes: tuple[int, int, int],
    lengths: tuple[int, ...],
    k: int,
    *,
    num_rows: int,
    dtype: torch.dtype,
    is_quantized: bool,
) -> None:
    """Score and select with the training's kernels and with the decode's; compare the bits.

    Args:
        sizes: Indexer heads, their channels, and keys of a page.
        lengths: Keys of each sequence.
        k: Keys selected.
        num_rows: Queries that training scores at once; the decode scores the last two of them.
        dtype: Of queries and keys.
        is_quantized: Whether the decode's keys are e4m3 and training's what `round_to_fp8` makes.
    """
    from megatron_keye.kernels.sparse_decode.triton_scores import score_pages

    heads, channels, page = sizes
    where, num_pages = device("triton"), -(-max(lengths) // page)
    generator = torch.Generator().manual_seed(3)
    pages_BN = torch.randperm(len(lengths) * num_pages, generator=generator)
    pages_BN = pages_BN.view(-1, num_pages).to(where)
    shapes = (len(lengths), num_rows, heads), (len(lengths), num_pages * page, channels)
    q_BTIJ = make_tensor(*shapes[0], channels, seed=1, dtype=dtype).to(where)
    gate_BTI = make_tensor(*shapes[0], seed=3, dtype=torch.float32).to(where)
    trained_BSJ = keys_BSJ = make_tensor(*shapes[1], seed=2, dtype=dtype).to(where)
    scales_PL = None
    if is_quantized:
        q_BTIJ, trained_BSJ = (round_to_fp8(t, impl="triton") for t in (q_BTIJ, keys_BSJ))
        keys_BSJ, scales_BS = quantize(keys_BSJ, impl="triton")
        scales_PL = torch.empty_like(scales_BS).view(-1, page)
        scales_PL[pages_BN.flatten()] = scales_BS.view(-1, page)
    keys_PLJ = torch.empty_like(keys_BSJ).view(-1, page, channels)
    # As bytes, since not every type can be moved by index.
    bytes_PLX = keys_BSJ.view(-1, page, channels).view(torch.uint8)
    keys_PLJ.view(torch.uint8)[pages_BN.flatten()] = bytes_PLX
    heads_PLGC = torch.zeros(len(keys_PLJ), page, 1, 16, dtype=dtype, device=where)
    lengths_B = torch.tensor(lengths, device=where)
    cache = PagedCache(heads_PLGC, heads_PLGC, keys_PLJ, pages_BN.int(), lengths_B, scales_PL)
    last = q_BTIJ[:, -2:].contiguous(), gate_BTI[:, -2:]
    query_BTHC = heads_PLGC.new_zeros(len(lengths), 2, 1, 16)
    _, selected_BTK = sparse_decode(*last, query_BTHC, cache, k, scale=SCALE, impl="triton")
    decoded_BTS = score_pages(*last, cache, k)[0].view(len(lengths), 2, -1)
    for sequence, length in enumerate(lengths):
        end_T = (torch.arange(num_rows, device=where) + 1 - num_rows + length).clamp(min=0)
        row = q_BTIJ[sequence], trained_BSJ[sequence], gate_BTI[sequence]
        ranges = torch.zeros_like(end_T), end_T
        trained_TS = indexer_scores(*row, *ranges, impl="triton")
        trained_TK = lightning_indexer(*row, *ranges, k, impl="triton")
        assert torch.equal(selected_BTK[sequence], trained_TK[-2:]), f"selection of {length} keys"
        for query in (-2, -1):
            end = int(end_T[query])
            got_S, wanted_S = decoded_BTS[sequence, query, :end], trained_TS[query, :end]
            assert torch.equal(got_S, wanted_S), f"scores of {length} keys"


@pytest.mark.parametrize("is_quantized", [False, True])
def test_decode_scores_and_selects_as_training_does(is_quantized: bool) -> None:
    assert_decodes_as_trained(
        (5, 16, 8), (1, 41), 9, num_rows=3, dtype=torch.bfloat16, is_quantized=is_quantized
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [(5, torch.bfloat16), (16, torch.bfloat16), (64, torch.bfloat16), (16, torch.float32)],
)
def test_decode_scores_as_training_at_the_models_size(
    heads: int, is_quantized: bool, dtype: torch.dtype
) -> None:
    lengths = (5, 2048, 20_001, 131_072)
    assert_decodes_as_trained(
        (heads, 64, 64), lengths, 2048, num_rows=70, dtype=dtype, is_quantized=is_quantized
    )
