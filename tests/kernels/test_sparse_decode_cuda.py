# SPDX-License-Identifier: Apache-2.0
"""The CUDA sparse decode scores and selects as the Triton form does, and attends as float64 does.

What could go wrong is how keys lie in registers and shared memory, rings that are filled too
early, rows that end anywhere, and sums over warps and thread blocks.
"""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.sparse_decode import PagedCache, cuda, sparse_decode
from tests.support.decode_cases import Queries, Sizes, exact_attention, make_decode
from tests.support.numerics import assert_norm_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        missing_reason("sparse_decode_scores") is not None, reason="megatron_keye._C is not built"
    ),
]

SCALE = 0.1
TOLERANCE = 2.0**-7
"""Of a row's norm; weights and values are rounded to 8 bits."""
RAGGED = (0, 1, 15, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 5000)


def assert_scores_alike(queries: Queries, cache: PagedCache) -> None:
    """Compare scores and ends with those of the Triton form, bit for bit."""
    from megatron_keye.kernels.sparse_decode.triton_scores import score_pages

    scores_TS, end_T = cuda.score_pages(*queries[:2], cache)
    wanted_TS, wanted_T, _ = score_pages(*queries[:2], cache, 2048)
    assert torch.equal(end_T, wanted_T), "ends"
    length_T = cache.lengths_B.repeat_interleave(queries[0].shape[1])
    is_key_TS = torch.arange(scores_TS.shape[1], device="cuda") < length_T[:, None]
    wrong = ((scores_TS != wanted_TS) & is_key_TS).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} scores differ, such as {wrong[:5].tolist()} (row, key)"


def assert_decodes(queries: Queries, cache: PagedCache, k: int) -> tuple[Tensor, Tensor]:
    """Compare the selection with the Triton form's and the output with float64; return both."""
    out_BTHC, indices_BTK = sparse_decode(*queries, cache, k, scale=SCALE, impl="cuda")
    _, wanted_BTK = sparse_decode(*queries, cache, k, scale=SCALE, impl="triton")
    assert torch.equal(indices_BTK, wanted_BTK), "selection"
    expected_BTHC = exact_attention(queries[2], cache, indices_BTK, SCALE)
    for row, wanted in zip(out_BTHC.flatten(0, 1), expected_BTHC.flatten(0, 1), strict=True):
        assert_norm_close(row, wanted, TOLERANCE)
    return out_BTHC, indices_BTK


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(("num_queries", "index_heads", "page"), [(1, 16, 64), (8, 5, 16)])
def test_scores_are_those_of_triton(
    num_queries: int, index_heads: int, page: int, is_quantized: bool
) -> None:
    sizes = Sizes(
        RAGGED,
        num_queries=num_queries,
        index_heads=index_heads,
        page=page,
        is_quantized=is_quantized,
    )
    (q_BTIJ, gate_BTI, query_BTHC), cache = make_decode(sizes)
    assert_scores_alike((q_BTIJ, gate_BTI, query_BTHC), cache)
    assert_scores_alike((q_BTIJ, gate_BTI.float() / 3, query_BTHC), cache)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_long_rows_score_as_triton(is_quantized: bool) -> None:
    """Blocks of several tiles, with each number of them; the ring comes around."""
    sizes = Sizes((131_072, 70_001) * 4, groups=1, channels=64, is_quantized=is_quantized)
    queries, cache = make_decode(sizes)
    tiles = cuda.choose_tiles(8, 131_072, 4 * 132)
    assert tiles > 1, "several tiles of a block"
    assert_scores_alike(queries, cache)


@pytest.mark.parametrize("num_queries", [1, 2, 8])
@pytest.mark.parametrize("heads", [4, 8, 16])
@pytest.mark.parametrize("channels", [64, 128])
def test_output_and_selection(num_queries: int, heads: int, channels: int) -> None:
    sizes = Sizes(RAGGED, num_queries=num_queries, heads=heads, channels=channels)
    queries, cache = make_decode(sizes)
    for k in (1, 100, 2048):
        assert_decodes(queries, cache, k)


@pytest.mark.parametrize("groups_of_block", [1, 2, 4])
@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_every_cut_gives_the_output(
    groups_of_block: int, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CUT", cuda.Cut(groups_of_block, cluster))
    queries, cache = make_decode(Sizes((0, 40, 3000)))
    assert_decodes(queries, cache, 2048)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_long_contexts_with_the_models_sizes(batch: int) -> None:
    lengths = tuple(131_072 - 4001 * sequence for sequence in range(batch))
    queries, cache = make_decode(Sizes(lengths, is_quantized=True))
    assert_decodes(queries, cache, 2048)


def test_equal_scores_select_the_lowest_keys() -> None:
    (q_BTIJ, gate_BTI, query_BTHC), cache = make_decode(Sizes((3000, 70_001)))
    queries = torch.zeros_like(q_BTIJ), gate_BTI, query_BTHC
    _, indices_BTK = assert_decodes(queries, cache, 2048)
    assert torch.equal(indices_BTK, torch.arange(2048, device="cuda").expand(2, 1, -1).int())


def test_a_key_without_a_page_ranks_last_and_is_not_attended() -> None:
    queries, cache = make_decode(Sizes((1000, 1000)))
    cache.pages_BN[0, 1], cache.pages_BN[1, 3:5] = -1, 2**31 - 1
    _, indices_BTK = assert_decodes(queries, cache, 936)
    assert not torch.isin(indices_BTK[0], torch.arange(64, 128, device="cuda")).any()
    assert_decodes(queries, cache, 990)


def test_a_growing_maximum_scales_what_is_there() -> None:
    (q_BTIJ, gate_BTI, query_BTHC), cache = make_decode(Sizes((2048,)))
    steps_S = torch.linspace(0, 8, 2048, device="cuda")
    slot_S = cache.pages_BN[0].repeat_interleave(64) * 64 + torch.arange(2048, device="cuda") % 64
    cache.keys_PLGC.flatten(0, 1)[slot_S.long()] *= steps_S[:, None, None].bfloat16()
    assert_decodes((q_BTIJ, gate_BTI, query_BTHC), cache, 2048)


def test_a_graph_replays_other_lengths_with_the_same_bits() -> None:
    queries, cache = make_decode(Sizes((5000, 4000, 3000)))
    run = lambda: sparse_decode(*queries, cache, 2048, scale=SCALE, impl="cuda")  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for lengths in ((5000, 4000, 3000), (1, 4000, 2048)):
        cache.lengths_B.copy_(torch.tensor(lengths))
        expected = [each.clone() for each in run()]
        for _ in range(3):
            graph.replay()
            for got, wanted in zip(replayed, expected, strict=True):
                assert torch.equal(got, wanted), f"lengths {lengths}"


def test_what_the_kernels_do_not_take_is_refused() -> None:
    queries, cache = make_decode(Sizes((100,), page=8))
    with pytest.raises(ValueError, match=r"got L = 8, expected a power of two from 16 on"):
        sparse_decode(*queries, cache, 5, scale=SCALE, impl="cuda")
    queries, cache = make_decode(Sizes((100,), heads=32))
    with pytest.raises(ValueError, match=r"got H / G = 32, expected 1 to 16"):
        sparse_decode(*queries, cache, 5, scale=SCALE, impl="cuda")
    queries, cache = make_decode(Sizes((100,), has_fp8_heads=True))
    with pytest.raises(ValueError, match=r"got keys and values of torch.float8_e4m3fn, expected"):
        sparse_decode(*queries, cache, 5, scale=SCALE, impl="cuda")
