# SPDX-License-Identifier: Apache-2.0
"""The index mathematics of the CUDA sparse decode, by plain numbers on a CPU.

How the kernels cut selections, where keys lie in their rings, which lane holds which products,
and what their bits mean: mirrored here and compared with the definition, since no GPU need be
there to find such an error.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_decode import PagedCache, cuda, sparse_decode
from tests.support.numerics import assert_close, make_tensor, odd_selection

SCALE = 0.3
WARPS, LIST_KEYS, TILE_KEYS = 8, 32, 16
LANES = np.arange(32)


def attend_warp(
    query_HC: Tensor, k_SC: Tensor, v_SC: Tensor, lists: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m_H, l_H and acc_HC of a warp over its lists of selected keys, tile by tile."""
    m_H = torch.full((len(query_HC),), -1.0e38, dtype=torch.float64)
    l_H, acc_HC = torch.zeros_like(m_H), torch.zeros(len(query_HC), v_SC.shape[1]).double()
    for keys in lists:
        if all(key < 0 for key in keys):
            break  # a selection ends in -1
        for first in range(0, LIST_KEYS, TILE_KEYS):
            tile_U = torch.tensor(keys[first : first + TILE_KEYS])
            logits_HU = query_HC @ k_SC[tile_U.clamp(min=0)].T * SCALE * math.log2(math.e)
            logits_HU = logits_HU.masked_fill(tile_U < 0, -torch.inf)
            highest_H = torch.maximum(m_H, logits_HU.amax(1))
            weights_HU = torch.exp2(logits_HU - highest_H[:, None])
            rescale_H = torch.exp2(m_H - highest_H)
            m_H, l_H = highest_H, l_H * rescale_H + weights_HU.sum(1)
            acc_HC = acc_HC * rescale_H[:, None] + weights_HU @ v_SC[tile_U.clamp(min=0)]
    return m_H, l_H, acc_HC


def merge(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of several warps, or thread blocks, as one."""
    highest_H = torch.stack([m_H for m_H, _, _ in parts]).amax(0)
    weights = [torch.exp2(m_H - highest_H) for m_H, _, _ in parts]
    l_H = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
    acc_HC = sum(weight[:, None] * part[2] for weight, part in zip(weights, parts, strict=True))
    return highest_H, torch.as_tensor(l_H), torch.as_tensor(acc_HC)


def attend_cut(
    query_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, indices_TK: Tensor, cut: cuda.Cut
) -> Tensor:
    """Return out_THC as thread blocks, clusters of them and warps cut it."""
    num_rows, num_selected = indices_TK.shape
    num_groups, heads = k_SGC.shape[1], query_THC.shape[1] // k_SGC.shape[1]
    clusters_of_row, warps = num_groups // cut.groups_of_block, WARPS // cut.groups_of_block
    out_THC = torch.full_like(query_THC, torch.nan)
    blocks: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for block in range(num_rows * clusters_of_row * cut.cluster):
        cluster, rank = divmod(block, cut.cluster)
        row = cluster // clusters_of_row
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for warp in range(WARPS):
            local = warp % cut.groups_of_block
            group = cluster % clusters_of_row * cut.groups_of_block + local
            part = rank * warps + warp // cut.groups_of_block
            starts = range(part * LIST_KEYS, num_selected, cut.cluster * warps * LIST_KEYS)
            lists = [indices_TK[row, start : start + LIST_KEYS].tolist() for start in starts]
            lists = [keys + [-1] * (LIST_KEYS - len(keys)) for keys in lists]
            query_HC = query_THC[row, group * heads : (group + 1) * heads]
            done = attend_warp(query_HC, k_SGC[:, group], v_SGC[:, group], lists)
            parts.setdefault(group, []).append(done)
        for group, of_group in parts.items():
            blocks.setdefault((row, group), []).append(merge(of_group))
    for (row, group), of_cluster in blocks.items():
        _, l_H, acc_HC = merge(of_cluster)
        factor_H = torch.where(l_H > 0, 1 / l_H, 0.0)
        out_THC[row, group * heads : (group + 1) * heads] = acc_HC * factor_H[:, None]
    return out_THC


@pytest.mark.parametrize("cut", [cuda.Cut(1, 1), cuda.Cut(2, 2), cuda.Cut(4, 8)])
def test_warps_and_blocks_add_up_to_the_attention(cut: cuda.Cut) -> None:
    num_keys, k = 700, 333
    query_THC = make_tensor(3, 16, 8, seed=1)
    k_SGC, v_SGC = (make_tensor(num_keys, 4, 8, seed=seed) for seed in (2, 3))
    indices_TK = odd_selection(3, num_keys, k, seed=4)
    indices_TK[2] = odd_selection(k + 1, num_keys, k, seed=5)[k]
    assert (indices_TK[0] == -1).all() and (indices_TK[2] >= 0).all(), "no key, and all"
    expected_THC, _ = sparse_attention(
        query_THC, k_SGC, v_SGC, indices_TK, scale=SCALE, impl="eager"
    )
    assert_close(attend_cut(query_THC, k_SGC, v_SGC, indices_TK, cut), expected_THC, 1e-12)


def test_cuts_fill_the_gpu_and_share_what_there_is() -> None:
    def cut(num_rows: int, num_selected: int = 2048, num_groups: int = 4) -> cuda.Cut:
        return cuda.choose_cut(num_rows, num_selected, num_groups, 132)

    assert cut(1) == cuda.Cut(1, 8), "as many multiprocessors as one row fills"
    assert cut(8) == cuda.Cut(2, 4) and cut(32) == cuda.Cut(2, 2) and cut(256) == cuda.Cut(2, 1)
    assert cut(32, num_groups=1) == cuda.Cut(1, 2) and cut(64, num_groups=3) == cuda.Cut(1, 1)
    assert cut(1, 64) == cuda.Cut(1, 1), "two lists"
    tiles = [cuda.choose_tiles(batch, 131_072, 4 * 132) for batch in (1, 8, 32, 1000)]
    assert tiles == [2, 4, 16, 16] and cuda.choose_tiles(1, 64, 528) == 1


def rows_of_vectors(num_vectors: int) -> list[int]:
    """Return at which 16 bytes of a warp's tile of indexer keys each vector of each row lies."""
    rows_of_line = 8 // num_vectors
    return [
        row * num_vectors + (vector ^ (row // rows_of_line % num_vectors))
        for row in range(32)
        for vector in range(num_vectors)
    ]


@pytest.mark.parametrize("num_vectors", [4, 8])
def test_rings_have_room_for_each_vector_and_no_bank_conflicts(num_vectors: int) -> None:
    places = rows_of_vectors(num_vectors)
    assert sorted(places) == list(range(32 * num_vectors)), "each once"
    by_row = np.array(places).reshape(4, 8, num_vectors)
    for eight in by_row:  # rows that one matrix load reads together
        for vector in range(num_vectors):
            assert len(set(eight[:, vector] % 8)) == 8, "eight different banks of 16 bytes"


def test_a_lane_gets_all_heads_of_its_key() -> None:
    """Products [rows of a warp's halves, heads] by lane, exchanged as the kernel does."""
    dots = np.arange(2 * 16 * 16).reshape(2, 16, 16)  # half, row of the warp, head
    for eight in range(2):
        for odd in range(2):
            words = np.zeros((32, 4), int)
            for key in range(4):
                row = LANES // 4 + key % 2 * 8
                words[:, key] = dots[key // 2, row, 8 * eight + LANES % 4 * 2 + odd]
            for bit in (1, 2):
                is_upper = LANES & bit != 0
                for i in range(4):
                    if i & bit == 0:
                        given = np.where(is_upper, words[:, i], words[:, i | bit])
                        got = given[LANES ^ bit]
                        words[:, i] = np.where(is_upper, got, words[:, i])
                        words[:, i | bit] = np.where(is_upper, words[:, i | bit], got)
            row = LANES % 4 // 2 * 16 + LANES % 2 * 8 + LANES // 4  # of the lane's key
            for lane in range(4):
                wanted = dots[row // 16, row % 16, 8 * eight + 2 * lane + odd]
                np.testing.assert_array_equal(words[:, lane], wanted)


def widened(signs: Tensor, magnitudes: Tensor) -> Tensor:
    """Return pairs of bfloat16 as the kernel makes them of shifted words."""
    bits = (signs & 0x80008000) | (magnitudes & 0x07F007F0)
    halves = torch.stack([bits & 0xFFFF, bits >> 16 & 0xFFFF], 1)
    small = (halves << 16).to(torch.int32).view(torch.float32)
    return (small.double() * 2.0**120).bfloat16()


def test_keys_of_8_bits_become_what_they_are_and_meet_their_queries() -> None:
    numbers = torch.arange(256).to(torch.uint8)
    is_number = ~numbers.view(torch.float8_e4m3fn).float().isnan()
    for channels in numbers.view(-1, 4):
        word = int.from_bytes(bytes(channels.tolist()), "little")
        low, high = word << 4 & 0xFFFFFFFF, word << 8 & 0xFFFFFFFF
        even = widened(torch.tensor([high]), torch.tensor([low]))[0]
        odd = widened(torch.tensor([word]), torch.tensor([word >> 4]))[0]
        expected = channels.view(torch.float8_e4m3fn).bfloat16()
        for got, place in zip((*even, *odd), (0, 2, 1, 3), strict=True):
            if is_number[channels[place].long()]:
                assert got == expected[place] and got.signbit() == expected[place].signbit()
    # A lane's four channels of a step: the terms that they become, and the query's channel there.
    for lane in range(4):
        terms = [2 * lane, 2 * lane + 1, 8 + 2 * lane, 9 + 2 * lane]
        channels_there = [2 * (term % 8) + term // 8 for term in terms]
        assert channels_there == [4 * lane + place for place in (0, 2, 1, 3)]


def test_a_call_without_the_extension_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("may be built here")
    q_BTIJ, gate_BTI = torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2)
    heads = torch.zeros(1, 16, 1, 64)
    table = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4])
    cache = PagedCache(heads, heads, torch.zeros(1, 16, 64), *table)
    query_BTHC = torch.zeros(1, 1, 4, 64)
    with pytest.raises((RuntimeError, ValueError), match="sparse_decode.*impl 'cuda'"):
        sparse_decode(q_BTIJ, gate_BTI, query_BTHC, cache, 4, scale=SCALE, impl="cuda")
