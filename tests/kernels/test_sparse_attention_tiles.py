# SPDX-License-Identifier: Apache-2.0
"""The CUDA backward pass of the sparse attention as plain mathematics, tile by tile.

What it computes per thread block and tile of keys, in the same order and under the same bits, but
in float64 on a CPU: wrong masks, scales or blocks show without a GPU. How values lie in registers
and shared memory is the concern of backward_layout.cu.
"""

import math

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.union_lists import TILE_QUERIES, UnionLists, union_lists
from tests.support.numerics import (
    assert_close,
    gradients,
    make_tensor,
    odd_selection,
    trainable,
)

SCALE = 0.3
TILE_KEYS = 64


def differentiate_block(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    k_SC: Tensor,
    v_SC: Tensor,
    union: tuple[list[int], list[int]],
    bit_R: Tensor,
    sums_S2C: Tensor,
) -> Tensor:
    """Return dq_RC of a block's rows, and add dk and dv of its keys to `sums_S2C`.

    Args:
        rows: q_RC, dout_RC, out_RC and, as log2, lse_R.
        k_SC: Keys of the group.
        v_SC: Values of the group.
        union: Keys of the tile of queries, and their mask words.
        bit_R: Bit of each row's query in a word; 0 where there is no query.
        sums_S2C: Of dk and dv.
    """
    q_RC, dout_RC, out_RC, lse_R = rows
    mean_R = (out_RC * dout_RC).sum(1)
    dq_RC = torch.zeros_like(q_RC)
    for first in range(0, len(union[0]), TILE_KEYS):
        keys = union[0][first : first + TILE_KEYS]
        word_U = torch.tensor(union[1][first : first + TILE_KEYS])
        k_UC, v_UC = k_SC[keys], v_SC[keys]
        logits_RU = (q_RC @ k_UC.T).masked_fill((word_U & bit_R[:, None]) == 0, -torch.inf)
        weights_RU = torch.exp2(logits_RU * SCALE * math.log2(math.e) - lse_R[:, None])
        dlogits_RU = weights_RU * (dout_RC @ v_UC.T - mean_R[:, None])
        dq_RC += dlogits_RU @ k_UC
        sums_S2C[keys, 0] += dlogits_RU.T @ q_RC * SCALE
        sums_S2C[keys, 1] += weights_RU.T @ dout_RC
    return dq_RC * SCALE


def differentiate(
    saved: tuple[Tensor, ...], dout_THC: Tensor, lists: UnionLists, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_THC, dk_SGC and dv_SGC by blocks of `rows` rows of one group.

    Args:
        saved: q_THC, k_SGC, v_SGC, out_THC and, as log2, lse_TH.
        dout_THC: Gradient of the output.
        lists: Unions of the selections.
        rows: Heads of queries that a thread block has.
    """
    q_THC, k_SGC, v_SGC, out_THC, lse_TH = saved
    num_groups, heads = k_SGC.shape[1], q_THC.shape[1] // k_SGC.shape[1]
    dq_THC, sums_SG2C = torch.zeros_like(q_THC), torch.stack([k_SGC, v_SGC], 2) * 0
    queries = rows // heads
    for group in range(num_groups):
        of_group = slice(group * heads, (group + 1) * heads)
        for first in range(0, len(q_THC), queries):
            tile, first_local = divmod(first, TILE_QUERIES)
            count = int(lists.counts_B[tile])
            union = (
                lists.keys_BU[tile, :count].tolist(),
                [word & 0xFFFF for word in lists.masks_BU[tile, :count].tolist()],
            )
            of_block = slice(first, first + queries)
            own = tuple(each[of_block, of_group] for each in (q_THC, dout_THC, out_THC))
            bit_R = 1 << (first_local + torch.arange(len(own[0]) * heads) // heads)
            dq_RC = differentiate_block(
                (*(each.flatten(0, 1) for each in own), lse_TH[of_block, of_group].flatten()),
                k_SGC[:, group],
                v_SGC[:, group],
                union,
                bit_R,
                sums_SG2C[:, group],
            )
            dq_THC[of_block, of_group] = dq_RC.unflatten(0, (-1, heads))
    return dq_THC, sums_SG2C[:, :, 0], sums_SG2C[:, :, 1]


def log2_sums(q_THC: Tensor, k_SGC: Tensor, indices_TK: Tensor) -> Tensor:
    """Return log2 of each row's sum of exponentials, +inf without any key."""
    is_selected_TS = torch.zeros(len(q_THC), len(k_SGC) + 1, dtype=torch.bool)
    is_selected_TS.scatter_(1, indices_TK.long() % (len(k_SGC) + 1), True)
    keys_SHC = k_SGC.repeat_interleave(q_THC.shape[1] // k_SGC.shape[1], 1)
    logits_THS = torch.einsum("thc,shc->ths", q_THC, keys_SHC) * SCALE
    logits_THS = logits_THS.masked_fill(~is_selected_TS[:, None, :-1], -torch.inf)
    lse_TH = logits_THS.logsumexp(2) * math.log2(math.e)
    return torch.where(lse_TH.isneginf(), torch.inf, lse_TH)


@pytest.mark.parametrize(("heads", "rows"), [(4, 64), (8, 128), (16, 128)])
def test_tiles_of_keys_and_blocks_of_rows_give_the_gradients(heads: int, rows: int) -> None:
    num_queries, num_keys = 37, 300
    inputs = trainable(
        (
            make_tensor(num_queries, 2 * heads, 8, seed=1),
            make_tensor(num_keys, 2, 8, seed=2),
            make_tensor(num_keys, 2, 8, seed=3),
        )
    )
    indices_TK = odd_selection(num_queries, num_keys, 30, seed=4)
    indices_TK[16:20] = -1
    out_THC, _ = sparse_attention(*inputs, indices_TK, scale=SCALE, impl="eager")
    expected = gradients(out_THC, *inputs)
    with torch.no_grad():
        lists = union_lists(indices_TK, num_keys)
        assert int(lists.counts_B.max()) > 2 * TILE_KEYS, "several tiles, and the end of one"
        dout_THC = make_tensor(*out_THC.shape, seed=99)  # as `gradients` weighs
        lse_TH = log2_sums(*inputs[:2], indices_TK)
        actual = differentiate((*inputs, out_THC, lse_TH), dout_THC, lists, rows)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-12)
