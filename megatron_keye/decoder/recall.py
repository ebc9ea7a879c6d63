# SPDX-License-Identifier: Apache-2.0
"""Recall of the indexer's selection: its share of the dense attention weights.

It is measured on a few queries per row, since dense attention is what sparse attention avoids.
"""

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_keye.decoder.row import DecoderRow
from megatron_keye.kernels.visible_keys import find_visible

_SAMPLED_QUERIES = 16
"""Queries per row and layer; at 256K tokens their dense scores take 2 GFLOP per head."""


@record_function("decoder.indexer.recall")
@torch.no_grad()
def measure_recall(q_THC: Tensor, k_SGC: Tensor, indices_TK: Tensor, row: DecoderRow) -> None:
    """Add the selected keys' share of the dense attention weights to the row's meter.

    Evenly spaced local queries are sampled; padding does not count, and a query counts once,
    however many paths lead through it.

    Args:
        q_THC: [T, H, C] rotated queries of the local tokens.
        k_SGC: [S, G, C] rotated keys of the whole row.
        indices_TK: int32 [T, K] selected keys, -1 for none.
        row: The row.
    """
    num_queries = len(q_THC)
    step = max(1, num_queries // _SAMPLED_QUERIES)
    sample = torch.arange(step - 1, num_queries, step, device=q_THC.device)
    groups = k_SGC.shape[1]
    q_TGHC = q_THC[sample].unflatten(1, (groups, -1)).float()
    scores_TGHS = torch.einsum("tghc,sgc->tghs", q_TGHC, k_SGC.float()) * q_THC.shape[-1] ** -0.5
    ranges = row.key_start_T[sample], row.key_end_T[sample]
    is_visible_TS = find_visible(*ranges, len(k_SGC), row.key_reach_S)
    weights_TGHS = scores_TGHS.masked_fill(~is_visible_TS[:, None, None], -torch.inf).softmax(-1)
    chosen_TK = indices_TK[sample].long()
    is_chosen_TS = torch.zeros_like(is_visible_TS, dtype=torch.float32)
    is_chosen_TS.scatter_add_(1, chosen_TK.clamp(min=0), (chosen_TK >= 0).float())
    recall_T = torch.einsum("tghs,ts->tgh", weights_TGHS, is_chosen_TS).mean(dim=(1, 2))
    is_real_T = row.is_real_T[sample].float()
    row.meter.accumulate("recall", (recall_T * is_real_T).sum())
    row.meter.accumulate("recall_queries", is_real_T.sum())
