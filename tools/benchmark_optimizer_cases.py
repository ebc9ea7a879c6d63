# SPDX-License-Identifier: Apache-2.0
"""The cases of tools/benchmark_optimizer.py: what each updates, and how they are timed."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.kernels.drawn_normal import fill_normal
from megatron_keye.optim.staged_adamw import StagedAdamW
from megatron_keye.parallel.cpu import run_megatron_on_cpu
from tools.benchmark_lines import shared_fields, write_line

_SHAPE = (2048, 1536)
_REPEATS = 5
_SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

Step = Callable[[], Any]


def measure_all(num_parameters: int, out: Path | None) -> None:
    """Print a JSON line for each case.

    Args:
        num_parameters: Weights; 0 for 2 billion on a GPU and 20 million without.
        out: File to append the lines to, if any.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        run_megatron_on_cpu()
    device = torch.device("cuda" if has_gpu else "cpu")
    num_parameters = num_parameters or (2 * 10**9 if has_gpu else 2 * 10**7)
    num_tensors = max(1, num_parameters // (_SHAPE[0] * _SHAPE[1]))
    shared = {
        "parameters": num_tensors * _SHAPE[0] * _SHAPE[1],
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "torch": torch.__version__,
        **shared_fields("tools.benchmark_optimizer"),
    }
    for fields, make in cases(device, num_tensors):
        try:
            measured = measure(make)
        except RuntimeError as error:
            measured = {"failure": str(error).splitlines()[0]}
        write_line({**fields, **measured, **shared}, out)


def cases(
    device: torch.device, num_tensors: int
) -> Iterator[tuple[dict[str, Any], Callable[[], Step]]]:
    """Yield what each case is, and a function that makes what it times."""
    make = partial(weights_on, device, num_tensors)
    yield {"op": "draw"}, lambda: drawing(make())
    yield {"op": "update", "impl": "torch, float32"}, lambda: by_torch(make())
    for offload in (0.0, 1.0):
        for moments in ("fp32", "bf16"):
            fields = {"op": "update", "impl": "staged", "offload": offload, "moments": moments}
            settings = OptimizerConfig(offload=offload, moments=moments)
            yield fields, partial(staged, make, settings)
    if device.type == "cuda":  # The other finds nothing to offload.
        fields = {"op": "update", "impl": "HybridDeviceOptimizer", "offload": 1.0}
        yield fields, lambda: hybrid(make())


def weights_on(device: torch.device, num_tensors: int) -> list[Tensor]:
    """Return flat weights with their gradients."""
    size = _SHAPE[0] * _SHAPE[1]
    weights = [torch.zeros(size, dtype=torch.bfloat16, device=device) for _ in range(num_tensors)]
    for weight in weights:
        weight.decoupled_grad = torch.full((size,), 1e-3, device=device)  # type: ignore[attr-defined]
    return weights


def measure(make: Callable[[], Step]) -> dict[str, Any]:
    """Return the seconds of making a case and of each repetition, and the memory it held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    making, step = timed(make)
    seconds = [timed(step)[0] for _ in range(_REPEATS)]
    figures = {"make_seconds": making, "seconds": statistics.median(seconds[1:])}
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 4) for name, value in figures.items()}


def timed[Result](work: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that some work takes, and its result."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def drawing(weights: list[Tensor]) -> Step:
    """Draw all weights."""

    def draw() -> None:
        for number, weight in enumerate(weights):
            fill_normal(weight.view(_SHAPE), f"weight {number}", std=0.02)

    return draw


def by_torch(weights: list[Tensor]) -> Step:
    """Update float32 weights whose state is on the device."""
    masters = [weight.float() for weight in weights]
    for master, weight in zip(masters, weights, strict=True):
        master.grad = weight.decoupled_grad  # type: ignore[attr-defined]
    return torch.optim.AdamW(masters, fused=True, **_SETTINGS).step


def staged(make: Callable[[], list[Tensor]], settings: OptimizerConfig) -> Step:
    """Update with this project's AdamW."""
    optimizer = StagedAdamW([{"params": make(), **_SETTINGS}], settings)
    return optimizer.step


def hybrid(weights: list[Tensor]) -> Step:
    """Update with Megatron-Core's, as its own settings make it."""
    optimizer = HybridDeviceOptimizer(
        [{"params": weights}],
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=True,
        fused=True,
        **_SETTINGS,
    )
    step: Step = optimizer.step
    return step
