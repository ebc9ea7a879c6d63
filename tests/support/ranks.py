# SPDX-License-Identifier: Apache-2.0
"""Runs a function on n processes with gloo or NCCL; they are reused, since imports take seconds.

Each call makes and destroys the process group of all ranks, with a file instead of a port, so that
calls do not share groups.
"""

import atexit
import gc
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

_TIMEOUT_SECONDS = 300
_pools: dict[tuple[int, str], "_Pool"] = {}


class RankError(AssertionError):
    """A function failed on a rank; carries that rank's traceback."""


def run_on_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu"
) -> list[Any]:
    """Call `function(*arguments)` on every rank and return the results in rank order.

    Args:
        num_ranks: Processes of the job.
        function: A function at module level, which workers can import.
        arguments: Picklable arguments.
        device: "cpu" for gloo, "cuda" for NCCL with one GPU per rank.

    Raises:
        RankError: With the first failing rank's traceback, or when ranks time out.
    """
    key = (num_ranks, device)
    if key not in _pools:
        _pools[key] = _Pool(num_ranks, device)
    try:
        return _pools[key].call(function, arguments)
    except BaseException:
        _pools.pop(key).stop()
        raise


class _Pool:
    """Worker processes of one world size."""

    def __init__(self, num_ranks: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._workers = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank, num_ranks, device))
            process.start()
            self._workers.append((process, here))

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        self._calls += 1
        init_method = f"file://{Path(self._folder.name) / str(self._calls)}"
        for _, pipe in self._workers:
            pipe.send((function, arguments, init_method))
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while pipes:
            ready = wait(list(pipes), timeout=_TIMEOUT_SECONDS)
            if not ready:
                raise RankError(f"ranks {sorted(pipes.values())} did not answer in time")
            for pipe in ready:
                rank = pipes.pop(pipe)
                results[rank] = _receive(pipe, rank)
        return [results[rank] for rank in sorted(results)]

    def stop(self) -> None:
        """End all workers, and the processes that Megatron's checkpointing keeps in each."""
        for process, _ in self._workers:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
        self._folder.cleanup()


def _receive(pipe: Connection, rank: int) -> Any:
    try:
        failed, result = pipe.recv()
    except EOFError:
        raise RankError(f"rank {rank} died") from None
    if failed:
        raise RankError(f"rank {rank} failed:\n{result}")
    return result


def _work(pipe: Connection, rank: int, num_ranks: int, device_type: str) -> None:
    """Serve calls until the parent closes the pipe."""
    import faulthandler

    import torch

    from megatron_keye.parallel.process import join

    faulthandler.enable()
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", rank)
    while True:
        try:
            function, arguments, init_method = pipe.recv()
        except EOFError:
            sys.exit(0)
        try:
            join(device, rank=rank, num_ranks=num_ranks, init_method=init_method)
            result = (False, function(*arguments))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        except BaseException:
            result = (True, traceback.format_exc())
        # Models hold their groups in reference cycles, and each gloo group has threads.
        gc.collect()
        pipe.send(result)


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
