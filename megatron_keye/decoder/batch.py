"""Every tensor of one row that crosses to the device of one decoder rank.

Kept apart from the row it is cut from, so that what is sent where can be read in one place.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The part of one packed row that a decoder rank works on; S is the row's length."""

    token_ids_BS: Tensor
    """int64 [1, S/CP]: token ids at this rank's positions."""
    label_positions_L: Tensor
    """int64 [L]: local positions, 0 to S/CP - 1, that have a token to predict."""
    labels_L: Tensor
    """int64 [L]: the tokens to predict there."""
    position_ids_3T: Tensor
    """int64 [3, S/CP]: time, height and width position of each token."""
    key_start_T: Tensor
    """int64 [S/CP]: first row position that a query may see (its document's start)."""
    key_end_T: Tensor
    """int64 [S/CP]: one past the last row position that a query may see (itself)."""
    is_real_T: Tensor
    """bool [S/CP]: False for padding."""
    gathered_order_S: Tensor
    """int64 [S]: where each row position lies after gathering over the context axis."""
    feature_positions_M: Tensor
    """int64 [M]: where vision features go, counted in the S/CP/TP embeddings of this rank."""

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})
