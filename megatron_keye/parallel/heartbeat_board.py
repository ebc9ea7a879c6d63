# SPDX-License-Identifier: Apache-2.0
"""The heartbeats of all ranks in the job's key-value store."""

from collections.abc import Sequence
from typing import Any, cast

from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_keye.parallel.process import Process


class HeartbeatBoard:
    """Leaves and reads heartbeats, with a connection of its own.

    A rank whose main thread waits in the store holds the connection that it waits on.
    """

    def __init__(self, process: Process) -> None:
        """Connect.

        Args:
            process: This rank.
        """
        self._process = process
        # Of every kind of store, but not in torch's types.
        self._store: Store = cast(Any, process.store).clone()
        self._beats = PrefixStore("heartbeats", self._store)

    def post(self, text: str) -> None:
        """Leave this rank's heartbeat."""
        self._beats.set(str(self._process.rank), text)

    def read(self) -> Sequence[bytes]:
        """Return the heartbeats of all ranks, by rank, once all have left one."""
        ranks = [str(rank) for rank in range(self._process.num_ranks)]
        return self._beats.multi_get(ranks)

    def read_host(self) -> bytes:
        """Return the heartbeat of rank 0, which hosts the store."""
        return self._beats.get("0")

    def is_reported(self) -> bool:
        """Return whether a rank has claimed to report why the run ends."""
        return bool(self._store.check(["first_to_fail"]))

    def claim_report(self) -> bool:
        """Return whether this rank is the first that asks, here or by `is_first_to_fail`."""
        return self._process.claim_failure(self._store)
