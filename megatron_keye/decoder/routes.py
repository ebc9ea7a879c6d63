# SPDX-License-Identifier: Apache-2.0
"""Experts that generation routed tokens to, which training routes them to again.

Generation and training compute in other orders, and at near ties their routers choose otherwise: a
tenth of all choices in a bfloat16 model (arXiv 2510.11370), which then moves all that follows.
Logits and probabilities stay those of training, so that the router learns; its balancing loss
counts what it would choose itself.

Shape letters: T tokens that this rank routes, L layers, K experts of a token, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Where the tokens of a row go, as far as that is known."""

    experts_TLK: Tensor
    """uint8 [S/CP/TP, L, K]: experts of each token in each layer of the whole model, in any order;
    anything where they are not known."""
    is_known_T: Tensor
    """bool [S/CP/TP]: False where the router chooses."""

    def to(self, device: torch.device) -> "Routes":
        """Return a copy on `device`."""
        return Routes(self.experts_TLK.to(device), self.is_known_T.to(device))

    def of_layer(self, layer_number: int, num_experts: int) -> Tensor:
        """Return each token's known experts, bool [E, S/CP/TP]; none where the router chooses.

        Args:
            layer_number: 1-based number of the layer in the whole model.
            num_experts: E.
        """
        experts_KT = self.experts_TLK[:, layer_number - 1].T.long()
        is_chosen_ET = self.is_known_T.new_zeros(num_experts, len(self.is_known_T))
        return is_chosen_ET.scatter_(0, experts_KT, self.is_known_T.expand_as(experts_KT))


@dataclass(frozen=True)
class KnownChoice:
    """Takes the place of Megatron's `RouterReplay`, for one call of a router."""

    is_chosen_TE: Tensor
    """bool [T, E]: the known experts of each token, none where the router chooses."""

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        count: int,
        num_groups: int | None,
        group_count: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return scores and numbers of each token's experts, both [T, K]; called by Megatron.

        Args:
            scores_TE: The router's logits.
            count: K.
            num_groups: Passed to `choose`.
            group_count: Passed to `choose`.
            choose: Returns what the router would.
        """
        _, own_TK = choose(scores_TE, count, num_groups, group_count)
        known_TK = self.is_chosen_TE.byte().topk(count, dim=1).indices
        is_known_T1 = self.is_chosen_TE.any(dim=1, keepdim=True)
        experts_TK = torch.where(is_known_T1, known_TK, own_TK)
        return scores_TE.gather(1, experts_TK), experts_TK
