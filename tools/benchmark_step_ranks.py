# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of tools/benchmark_step.py and makes them one job."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.cli.local import LISTEN_FD, launch

ROOT = Path(__file__).parents[1]


def start_ranks(arguments: Sequence[str], num_ranks: int) -> int:
    """Run the same command once per rank and return the exit status; one that fails ends all."""
    # Ranks do not look for modules in the folder in which they start (cli/environment.py).
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return launch([sys.executable, "-m", "tools.benchmark_step", *arguments], num_ranks)


def rank_and_ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as its launcher set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Make this process a rank of the job, without TF32, until the context ends."""
    import torch

    from megatron_keye.parallel.process import join, resolve_device
    from megatron_keye.verify.one_process import alone

    rank, num_ranks = rank_and_ranks()
    device = resolve_device("auto", rank)
    if num_ranks == 1:
        with alone(device):
            yield
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    listen_fd = int(os.environ[LISTEN_FD]) if LISTEN_FD in os.environ else None
    join(device, rank=rank, num_ranks=num_ranks, init_method="env://", listen_fd=listen_fd)
    yield
    torch.distributed.destroy_process_group()
