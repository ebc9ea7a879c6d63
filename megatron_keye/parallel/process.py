"""Makes this process a rank of the job: device, backend, and the group of all ranks."""

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
"""How long a collective waits for a rank that no longer answers."""


@dataclass(frozen=True)
class Process:
    """One rank of the job."""

    rank: int
    """Number of this process among all."""
    num_ranks: int
    """Processes of the whole job."""
    device: torch.device
    """Where this rank computes."""
    store: Store
    """Small facts that all ranks see."""

    def is_first_to_fail(self) -> bool:
        """Tell whether no other rank has failed before, so that one error is told once.

        A rank that loses its peers fails too, in ways that say nothing; the first one knows why.
        """
        try:
            winner = self.store.compare_set("first_to_fail", "", str(self.rank))
        except RuntimeError:
            # The rank that keeps the store is gone already, so this one was not the first.
            return False
        return int(winner) == self.rank


def resolve_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Return the device of a rank.

    Args:
        wanted: The run's setting.
        local_rank: Number of this process on its machine.

    Raises:
        UserError: When a GPU is asked for and this rank has none.
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


def join(device: torch.device, *, rank: int, num_ranks: int, init_method: str) -> Process:
    """Enter the group of all ranks; gloo without a GPU, NCCL with one.

    Args:
        device: From `resolve_device`.
        rank: This process.
        num_ranks: All processes.
        init_method: Where the ranks meet, as torch.distributed takes it.
    """
    if device.type == "cpu":
        if torch.cuda.is_available():
            # Megatron-Core asks torch whether there is a GPU; this run must not use the one.
            torch.cuda.is_available = lambda: False
        run_megatron_on_cpu()
    else:
        torch.cuda.set_device(device)
    store, rank, num_ranks = next(rendezvous(init_method, rank, num_ranks, timeout=_TIMEOUT))
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=num_ranks,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return Process(rank=rank, num_ranks=num_ranks, device=device, store=store)
