# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees: as a mask over a range, or as the rows of a selection.

All eager operators share these two readings, so that an empty range or a padded entry means the
same in each of them.

Where documents branch, a range also holds keys of branches beside the query's own. Tokens lie
branch by branch, each behind the one that it goes on from and before what follows it, so what
descends from a key is one range too, and its end, the key's reach, says whether a later query has
the key on its path.

Shape letters: T queries, S keys, K selected keys of a query, X channels of a key.
"""

import torch
from torch import Tensor


def find_visible(
    key_start_T: Tensor, key_end_T: Tensor, num_keys: int, key_reach_S: Tensor | None = None
) -> Tensor:
    """Return bool [T, S]: whether key_start_T[t] <= s < key_end_T[t] <= key_reach_S[s].

    Args:
        key_start_T: int64, first visible key of each query.
        key_end_T: int64, one past the last visible key; at or below the start for no key at all.
        num_keys: S.
        key_reach_S: int64, the largest `key_end_T` of a query that sees the key; None where all
            keys of a range are visible. The first key of a range is visible anyway.
    """
    keys_S = torch.arange(num_keys, device=key_start_T.device)
    is_visible_TS = (keys_S >= key_start_T[:, None]) & (keys_S < key_end_T[:, None])
    if key_reach_S is None:
        return is_visible_TS
    return is_visible_TS & (key_end_T[:, None] <= key_reach_S)


def gather_selected(keys_SX: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selected keys [T, K, X] and bool [T, K], which of them are real.

    Args:
        keys_SX: Any float type.
        indices_TK: int32 or int64; entries outside 0 <= index < S are padding.

    Returns:
        Rows of `keys_SX`, 0 where the entry is padding, and the mask of real entries. Padding
        takes no value from any key, NaN included, and returns no gradient to one.
    """
    num_keys, num_channels = keys_SX.shape
    is_real_TK = (indices_TK >= 0) & (indices_TK < num_keys)
    if num_keys == 0:
        return keys_SX.new_zeros(*indices_TK.shape, num_channels), is_real_TK
    safe_TK = indices_TK.masked_fill(~is_real_TK, 0).long()
    gathered_TKX = keys_SX.index_select(0, safe_TK.flatten()).view(*indices_TK.shape, num_channels)
    # Masked before any arithmetic: multiplying by 0 later would keep a NaN.
    return gathered_TKX.masked_fill(~is_real_TK[:, :, None], 0), is_real_TK
