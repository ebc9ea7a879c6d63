# SPDX-License-Identifier: Apache-2.0
"""The tensors of one packed row that are copied to the device of a decoder rank."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_keye.decoder.routes import Routes


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """What policy training knows of a decoder rank's labels, and of the whole row's answers."""

    answers_L: Tensor
    """int64 [L]: number of the answer that each label belongs to, 0 to A - 1."""
    places_L: Tensor
    """int64 [L]: place of each label among the tokens of all answers of the step."""
    old_log_probs_L: Tensor
    """float64 [L]: log-probability of each label before the step's first update."""
    advantages_A: Tensor
    """float64 [A]: advantage of each answer of the row, equal on all context ranks."""

    def to(self, device: torch.device) -> "AnswerBatch":
        """Return a copy on `device`."""
        return AnswerBatch(**_moved(self, device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A decoder rank's part of one packed row; S is the row's length."""

    token_ids_BS: Tensor
    """int64 [1, S/CP]: token ids at this rank's positions."""
    label_positions_L: Tensor
    """int64 [L]: local positions, 0 to S/CP - 1, with a label."""
    labels_L: Tensor
    """int64 [L]: labels at these positions."""
    weights_L: Tensor
    """float32 [L]: weight of each label in the loss."""
    position_ids_3T: Tensor
    """int64 [3, S/CP]: time, height and width position of each token."""
    key_start_T: Tensor
    """int64 [S/CP]: first key visible to each query: the start of its document in the row."""
    key_end_T: Tensor
    """int64 [S/CP]: one past the last key visible to each query, which is its own position."""
    key_reach_S: Tensor | None = None
    """int64 [S]: the largest `key_end_T` of a query that sees each key; None where no document
    branches."""
    num_paths_T: Tensor | None = None
    """int64 [S/CP]: paths through each token; None where no document branches, so all have 1."""
    is_real_T: Tensor
    """bool [S/CP]: False for padding."""
    gathered_order_S: Tensor
    """int64 [S]: index of each row position after gathering over the context axis."""
    feature_positions_M: Tensor
    """int64 [M]: index of each vision feature among this rank's S/CP/TP embeddings."""
    routes: Routes | None = None
    """Experts of the tokens that this rank routes, as generation routed them; None where routers
    choose."""
    answers: AnswerBatch | None = None
    """What the labels are in policy training; None where they are to be imitated."""

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`."""
        return Batch(**_moved(self, device))


def _moved(batch: Batch | AnswerBatch, device: torch.device) -> dict[str, Any]:
    """Return the fields of a batch on a device, by name."""
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: None if part is None else part.to(device) for name, part in parts.items()}
