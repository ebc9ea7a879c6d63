# SPDX-License-Identifier: Apache-2.0
"""Eager form of the sparse attention: gather the selected keys of each query, then attend.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys. Beside a G, H stands for the H / G heads of one group.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.masked_softmax import masked_softmax
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import gather_selected


def sparse_attention(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, indices_TK: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out_THC and target_TGK; see api.sparse_attention."""
    dtype = accumulation_dtype(q_THC)
    num_heads = q_THC.shape[1]
    _, num_groups, num_channels = k_SGC.shape
    entries_per_key = 3 * num_heads + 4 * num_groups * num_channels
    out_THC, target_TGK = map_row_chunks(
        functools.partial(_attend_rows, scale=scale),
        (q_THC, indices_TK),
        (k_SGC.to(dtype), v_SGC.to(dtype)),
        bytes_per_row=entries_per_key * indices_TK.shape[1] * dtype.itemsize,
    )
    return out_THC, target_TGK


def _attend_rows(
    q_THC: Tensor, indices_TK: Tensor, k_SGC: Tensor, v_SGC: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out_THC and target_TGK of one chunk of rows; keys come in the accumulation type."""
    num_groups, num_channels = k_SGC.shape[1:]
    k_TKX, is_real_TK = gather_selected(k_SGC.flatten(1), indices_TK)
    v_TKX, _ = gather_selected(v_SGC.flatten(1), indices_TK)
    q_TGHC = q_THC.to(k_SGC.dtype).unflatten(1, (num_groups, -1))
    k_TKGC = k_TKX.unflatten(2, (num_groups, num_channels))
    v_TKGC = v_TKX.unflatten(2, (num_groups, num_channels))
    logits_TGHK = torch.einsum("tghc,tkgc->tghk", q_TGHC, k_TKGC) * scale
    weights_TGHK = masked_softmax(logits_TGHK, is_real_TK[:, None, None, :])
    out_TGHC = torch.einsum("tghk,tkgc->tghc", weights_TGHK, v_TKGC)
    return out_TGHC.flatten(1, 2).to(q_THC.dtype), weights_TGHK.detach().mean(dim=2)
