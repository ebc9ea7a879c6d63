# SPDX-License-Identifier: Apache-2.0
"""Makes this process a rank of the job: device, backend, and the group of all ranks."""

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_keye.errors import UserError
from megatron_keye.observe.hang import SLOW_FACTOR
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.parallel.cpu import run_megatron_on_cpu

_JOINING = timedelta(minutes=10)
"""How long a rank waits for the others to start; also the shortest time that the store waits."""
_FOR_EVER = timedelta(days=365)


@dataclass(frozen=True)
class Process:
    """One rank of the job."""

    rank: int
    """Global rank of this process."""
    num_ranks: int
    """World size."""
    device: torch.device
    """Where this rank computes."""
    store: Store
    """Key-value store that all ranks share."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """What this rank does at the moment."""

    def is_first_to_fail(self) -> bool:
        """Return whether no other rank has failed before, so that one error is reported once.

        A rank that loses its peers fails too, with errors that do not name the cause.
        """
        try:
            return self.claim_failure(self.store)
        except RuntimeError:
            # The rank that hosts the store has ended, so this one is not the first.
            return False

    def claim_failure(self, store: Store) -> bool:
        """Return whether no other rank has claimed before to report why the run ends.

        Args:
            store: A connection to the shared store; each thread needs one of its own.

        Raises:
            RuntimeError: If the rank that hosts the store has ended.
        """
        return int(store.compare_set("first_to_fail", "", str(self.rank))) == self.rank

    def has_any_failed(self) -> bool:
        """Return whether a rank has reported a failure, or took the store along."""
        try:
            return bool(self.store.check(["first_to_fail"]))
        except RuntimeError:
            return True


def resolve_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Return the device of a rank.

    Args:
        wanted: The run's setting; "auto" is a GPU where there is one.
        local_rank: 0-based index of this process on its machine.

    Raises:
        UserError: If a GPU is asked for, or found, and this rank has none.
    """
    num_gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise UserError(
            f"device: got {wanted!r} for local rank {local_rank}, expected a GPU for each rank "
            f"but torch sees {num_gpus}; start at most {num_gpus} ranks here, or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def exchange_timeout(hang_minutes: float) -> timedelta:
    """Return how long an exchange waits for a rank before it fails.

    The watchdog, which knows whether any rank progresses, judges before: after `hang_minutes`, or
    `SLOW_FACTOR` times as many in work that may be slow. An exchange that failed by then would
    end ranks that wait for one which is well.

    Args:
        hang_minutes: The run's setting; 0 for ever.
    """
    minutes = hang_minutes * (SLOW_FACTOR + 1)
    return timedelta(minutes=minutes) if minutes else _FOR_EVER


def group_timeout() -> timedelta:
    """Return how long exchanges of the group of all ranks wait, and so those of every group."""
    everyone = dist.group.WORLD
    assert everyone is not None, "the ranks have joined"
    backend = everyone._get_backend(torch.device(_device_type()))
    timeout: timedelta = backend.options._timeout
    return timeout


def exchange_error() -> str:
    """Return what NCCL reports of an exchange that failed, "" if none did.

    The main thread would wait for it for ever: NCCL is told (`cli/environment.py`) not to end the
    process itself, which shows C++ stack frames. Gloo's errors reach the main thread.
    """
    if not dist.is_initialized() or _device_type() == "cpu":
        return ""
    for group in list(distributed_c10d._world.pg_map):
        backend = group._get_backend(torch.device("cuda"))
        error = backend.get_error()
        if error.name != "SUCCESS":
            return f"NCCL reports {error.name} in a group of {group.size()} ranks"
    return ""


def _device_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def join(
    device: torch.device,
    *,
    rank: int,
    num_ranks: int,
    init_method: str,
    listen_fd: int | None = None,
    timeout: timedelta = _JOINING,
    heartbeat: Heartbeat | None = None,
) -> Process:
    """Initialize the group of all ranks: gloo on CPUs, NCCL on GPUs.

    Args:
        device: From `resolve_device`.
        rank: Global rank of this process.
        num_ranks: World size.
        init_method: URL for the rendezvous, as in torch.distributed.
        timeout: How long exchanges wait for a rank, of this group and of all that `build_grid`
            makes.
        heartbeat: What this rank does at the moment; by default one that nobody reads.
        listen_fd: For rank 0, a listening socket of the address that all others are given.
    """
    if device.type == "cpu":
        if torch.cuda.is_available():
            # Megatron-Core asks torch whether there is a GPU, which this run must not use.
            torch.cuda.is_available = lambda: False
        run_megatron_on_cpu()
    else:
        torch.cuda.set_device(device)
    patience = max(timeout, _JOINING)
    if listen_fd is None:
        store, rank, num_ranks = next(rendezvous(init_method, rank, num_ranks, timeout=patience))
    else:
        store = _host_store(listen_fd, num_ranks, patience)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    heartbeat = heartbeat or Heartbeat(rank=rank)
    return Process(rank=rank, num_ranks=num_ranks, device=device, store=store, heartbeat=heartbeat)


def _host_store(listen_fd: int, num_ranks: int, patience: timedelta) -> Store:
    """Return the store of all ranks, which this one hosts at a socket that is open already."""
    with socket.socket(fileno=os.dup(listen_fd)) as listening:
        host, port = listening.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined]  # imported where torch has it
        host,
        port,
        num_ranks,
        is_master=True,
        timeout=patience,
        multi_tenant=True,
        master_listen_fd=listen_fd,
    )
