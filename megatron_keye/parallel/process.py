"""Makes this process a rank of the job: device, backend, and the group of all ranks."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_keye.errors import UserError
from megatron_keye.parallel.cpu import run_megatron_on_cpu

_TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for an unresponsive rank."""


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

    def is_first_to_fail(self) -> bool:
        """Return whether no other rank has failed before, so that one error is reported once.

        A rank that loses its peers fails too, with errors that do not name the cause.
        """
        try:
            winner = self.store.compare_set("first_to_fail", "", str(self.rank))
        except RuntimeError:
            # The rank that hosts the store has ended, so this one is not the first.
            return False
        return int(winner) == self.rank


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


def join(
    device: torch.device,
    *,
    rank: int,
    num_ranks: int,
    init_method: str,
    listen_fd: int | None = None,
) -> Process:
    """Initialize the group of all ranks: gloo on CPUs, NCCL on GPUs.

    Args:
        device: From `resolve_device`.
        rank: Global rank of this process.
        num_ranks: World size.
        init_method: URL for the rendezvous, as in torch.distributed.
        listen_fd: For rank 0, a listening socket of the address that all others are given.
    """
    if device.type == "cpu":
        if torch.cuda.is_available():
            # Megatron-Core asks torch whether there is a GPU, which this run must not use.
            torch.cuda.is_available = lambda: False
        run_megatron_on_cpu()
    else:
        torch.cuda.set_device(device)
    if listen_fd is None:
        store, rank, num_ranks = next(rendezvous(init_method, rank, num_ranks, timeout=_TIMEOUT))
    else:
        store = _host_store(listen_fd, num_ranks)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=num_ranks,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return Process(rank=rank, num_ranks=num_ranks, device=device, store=store)


def _host_store(listen_fd: int, num_ranks: int) -> Store:
    """Return the store of all ranks, which this one hosts at a socket that is open already."""
    with socket.socket(fileno=os.dup(listen_fd)) as listening:
        host, port = listening.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined]  # imported where torch has it
        host,
        port,
        num_ranks,
        is_master=True,
        timeout=_TIMEOUT,
        multi_tenant=True,
        master_listen_fd=listen_fd,
    )
