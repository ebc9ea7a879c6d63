# SPDX-License-Identifier: Apache-2.0
"""Starts and joins the ranks of megatron-keye doctor --rates, and writes what they measure."""

import json
import os
import sys
import time
from pathlib import Path

from megatron_keye.cli import local
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.files.disk import check_writable, writing


def write_rates(file: Path, num_ranks: int | None) -> int:
    """Measure this machine's rates, write them to a file, and return the exit status.

    Args:
        file: JSON that megatron-keye plan --rates reads.
        num_ranks: Processes to start; None: one for each GPU, else one. Started by torchrun, this
            process is one of its ranks.

    Raises:
        UserError: For a file that cannot be written, or a rank without a GPU.
    """
    check_writable(file.parent, "the rates", needed_bytes=2**16)
    if "RANK" not in os.environ:
        num_ranks = num_ranks or local.count_gpus() or 1
        if num_ranks > 1:
            words = ["doctor", "--rates", str(file)]
            return local.launch([sys.executable, "-m", "megatron_keye", *words], num_ranks)
    rank, num_ranks = (int(os.environ.get(*each)) for each in (("RANK", "0"), ("WORLD_SIZE", "1")))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks)))
    # Both before torch is imported.
    complete_environment(os.environ, local_ranks=local_ranks)
    quieten_libraries()
    began = time.perf_counter()
    title, rates = _measure(rank, num_ranks, local_ranks)
    if rank == 0:
        found = {"device": title, "ranks": num_ranks, "rates": rates}
        with writing(file.parent, "the rates"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=2) + "\n")
        sys.stdout.write(_describe(title, num_ranks, rates, time.perf_counter() - began))
        sys.stdout.write(f"\n{file}: for megatron-keye plan --rates\n")
    return 0


def _measure(rank: int, num_ranks: int, local_ranks: int) -> tuple[str, dict[str, float]]:
    import torch

    from megatron_keye.cli.rates import device_title, measure_rates
    from megatron_keye.parallel.process import join, resolve_device

    device = resolve_device("auto", int(os.environ.get("LOCAL_RANK", "0")))
    if num_ranks > 1:
        listen_fd = local.meeting_socket()
        join(device, rank=rank, num_ranks=num_ranks, init_method="env://", listen_fd=listen_fd)
    rates = measure_rates(device, num_ranks, local_ranks)
    if num_ranks > 1:
        torch.distributed.destroy_process_group()
    return device_title(device), rates


def _describe(title: str, num_ranks: int, rates: dict[str, float], seconds: float) -> str:
    lines = [f"{title}, ranks: {num_ranks}, measured in {seconds:.0f} s"]
    if title.startswith("CPU"):
        lines.append("a CPU's rates: plans made with them say nothing of a GPU")
    lines += [f"  {name.replace('_', ' '):<38}{rate:>12,.4g}" for name, rate in rates.items()]
    return "\n".join(lines) + "\n"
