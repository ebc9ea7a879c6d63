# SPDX-License-Identifier: Apache-2.0
"""The interface of whatever answers requests, in these ranks or on a server."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from megatron_keye.rollout.request import Completion, NewToken, Request


class Engine(Protocol):
    """Answers requests."""

    version: int
    """Of the weights that answer."""

    def generate(
        self, requests: Iterable[Request], on_token: Callable[[NewToken], None] | None = None
    ) -> Iterator[Completion]:
        """Yield answers in the order in which they end.

        Args:
            requests: Taken as there is room for them; each has a key of its own.
            on_token: Called with each token as it is drawn.
        """

    def take_weights(self, version: int) -> None:
        """Answer with the weights as they are now; whatever was kept of earlier ones is dropped.

        Args:
            version: Number of these weights.
        """
