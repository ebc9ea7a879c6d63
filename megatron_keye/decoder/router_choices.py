# SPDX-License-Identifier: Apache-2.0
"""Keeps what the routers of a decoder choose, by hooks.

Shape letters: T tokens that this rank routes, L layers, K experts of a token, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_keye.decoder.router import Router


class RouterChoices:
    """The experts that routers choose, from one call of `take` to the next."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        """Listen to all routers.

        Args:
            decoder: The decoder, whose layers run in order.
        """
        self._experts: list[Tensor] = []
        routers = [each for each in decoder.modules() if isinstance(each, Router)]
        self._hooks = [each.register_forward_hook(self._note) for each in routers]

    def take(self) -> Tensor:
        """Return the choices since the last call, in one pass over a row: uint8 [T, L, K]."""
        experts_TLK = torch.stack(self._experts, dim=1)
        self._experts.clear()
        return experts_TLK

    def close(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, router: Router, _: Any, output: tuple[Tensor, Tensor]) -> None:
        is_chosen_TE = output[1]
        self._experts.append(is_chosen_TE.byte().topk(router.topk, dim=1).indices.byte())
