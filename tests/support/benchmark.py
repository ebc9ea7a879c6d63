# SPDX-License-Identifier: Apache-2.0
"""Times kernels on a GPU; writes a JSON line per case for `tools/report_benchmarks.py`.

A case and its peer run in one process, with the same inputs on the same GPU.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

_WARM_UPS = 2
_REPEATS = 5
_L2_BYTES = 256 * 2**20
"""Several times the L2 cache of any GPU."""


class Recorder:
    """Times cases, prints them and appends a line for each to a file."""

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        self._path = path
        self._machine = _describe_machine()

    def time(
        self,
        op: str,
        impl: str,
        run: Callable[[], object],
        *,
        fields: dict[str, Any],
        flop: float = 0.0,
        traffic: tuple[float, float] | None = None,
        peer: tuple[str, float] | None = None,
        in_graph: bool = False,
    ) -> float:
        """Time one case.

        Args:
            op: Operator, such as "sparse_attention_backward".
            impl: Implementation.
            run: Runs the case once.
            fields: Other fields of the line: shape, dtype, selection.
            flop: Useful floating-point operations of one call; a multiply-add counts 2.
            traffic: Bytes that one call has to move, and those that the memory moves in a second.
            peer: Name and milliseconds of the case to compare with.
            in_graph: Whether to time a CUDA graph of it, with a cold L2 cache, as for a case that
                takes less time than its kernel launches.

        Returns:
            Median of the repetitions in milliseconds.
        """
        for _ in range(_WARM_UPS):
            run()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        flush = torch.empty(_L2_BYTES if in_graph else 0, dtype=torch.uint8, device="cuda")
        timed = _graph_of(run) if in_graph else run
        milliseconds = torch.tensor([_milliseconds(timed, flush) for _ in range(_REPEATS)])
        low, median, high = milliseconds.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        line = {
            "op": op,
            "impl": impl,
            **fields,
            "median_us": round(median * 1e3, 1),
            "p10_us": round(low * 1e3, 1),
            "p90_us": round(high * 1e3, 1),
            "tflop_per_s": round(flop / median / 1e9, 1),
            "peak_mib": round((torch.cuda.max_memory_allocated() - allocated) / 2**20),
        }
        if traffic is not None:
            gb_per_s, bound = traffic[0] / median / 1e6, traffic[1] / 1e9
            line |= {"gb_per_s": round(gb_per_s), "share_of_bound": round(gb_per_s / bound, 3)}
        if peer is not None:
            line |= {"peer": peer[0], "times_faster": round(peer[1] / median, 3)}
        with self._path.open("a") as file:
            file.write(json.dumps(line | self._machine) + "\n")
        ratio = f"  {line['times_faster']:.2f}x {peer[0]}" if peer else ""
        sys.stdout.write(f"\n{op} {impl}: {median:.2f} ms, {line['tflop_per_s']} TFLOP/s{ratio}")
        return float(median)


def memory_bytes_per_second() -> float:
    """Return how many bytes a large copy on the GPU reads and writes in a second."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target, flush = torch.empty_like(source), source[:0]
    took = [_milliseconds(lambda: target.copy_(source), flush) for _ in range(_REPEATS)]
    return 2 * source.numel() / (sorted(took)[_REPEATS // 2] / 1e3)


def gradients_of(
    run: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs only the backward pass of `run`, for a random gradient."""
    out = run()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """Capture `run` in a CUDA graph and return its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _milliseconds(run: Callable[[], object], flush: Tensor) -> float:
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _describe_machine() -> dict[str, str]:
    """Return GPU, versions, commit and command, which all lines of a run share."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
    }
