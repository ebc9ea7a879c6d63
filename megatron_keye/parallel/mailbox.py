# SPDX-License-Identifier: Apache-2.0
"""Messages between threads of ranks, beside the collectives of their main threads.

They travel through the key-value store by which the ranks met. A thread that waits for a message
asks again and again, since a wait in the store would keep other threads of its rank from it.
"""

import time
from collections.abc import Sequence

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

_POLL_SECONDS = 0.02
_LONGEST_POLL_SECONDS = 0.5


class Mailbox:
    """Messages of one purpose; a name is used once."""

    def __init__(self, purpose: str) -> None:
        """Open a mailbox between the ranks of the job.

        Args:
            purpose: Tells its messages from others; the same on all ranks.
        """
        self._store = PrefixStore(purpose, _get_default_store())

    def post(self, name: str, message: bytes) -> None:
        """Leave a message."""
        self._store.set(name, message)  # type: ignore[arg-type]  # the stub knows text alone

    def collect(self, names: Sequence[str], timeout_seconds: float) -> list[bytes]:
        """Wait for messages.

        Args:
            names: Their names.
            timeout_seconds: How long to wait for all of them.

        Raises:
            TimeoutError: Names the first that has not come.
        """
        deadline, pause = time.monotonic() + timeout_seconds, _POLL_SECONDS
        for name in names:
            while not self._store.check([name]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no message {name} in {timeout_seconds:g} s")
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL_SECONDS)
        return [self._store.get(name) for name in names]

    def remove(self, names: Sequence[str]) -> None:
        """Drop messages that all have read."""
        for name in names:
            self._store.delete_key(name)
