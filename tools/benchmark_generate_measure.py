# SPDX-License-Identifier: Apache-2.0
"""Measures what tools/benchmark_generate.py lists, and writes its lines."""

import argparse
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from megatron_keye.config import ParallelConfig, RunConfig
from megatron_keye.config.backends import transformer_engine_version, uses_transformer_engine
from megatron_keye.config.fused_kernels import choose_fusions
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.process import resolve_device
from megatron_keye.parallel.random import seed_rank
from megatron_keye.recipes import load_recipe
from megatron_keye.rollout.grid import generating_run
from megatron_keye.verify.one_process import alone
from tools.benchmark_generate_answers import compare_answers
from tools.benchmark_generate_decode import compare_graphs, time_decode
from tools.benchmark_generate_prefill import time_prefill
from tools.benchmark_generate_setup import Bench
from tools.benchmark_lines import shared_fields, write_line

Measure = Callable[[Bench], Iterator[dict[str, Any]]]


def measure_all(options: argparse.Namespace) -> int:
    """Measure every case and write its lines; return 1 if one failed.

    Args:
        options: Of the command line.

    Raises:
        UserError: For a recipe or settings that do not fit, before anything is measured.
    """
    run = _run(options, has_gpu=torch.cuda.is_available())
    cases: dict[str, Measure] = {
        "prefill": time_prefill,
        "decode": time_decode,
        "graphs": compare_graphs,
        "answers": compare_answers,
    }
    has_failed = False
    device = resolve_device("auto", 0)
    with alone(device):
        grid = build_grid(run.parallel)
        seed_rank(run.training.seed, grid)
        with _built(run, grid, device) as model:
            bench = Bench(run, grid, model, device, options)
            shared = _shared_fields(run, device)
            for name in options.cases:
                for line in _lines(name, cases[name], bench):
                    has_failed |= "error" in line
                    write_line(line | shared, options.out)
    return int(has_failed)


def _run(options: argparse.Namespace, *, has_gpu: bool) -> RunConfig:
    """Return the recipe with a few layers, as it generates on one rank."""
    base = load_recipe(options.recipe)(num_ranks=1, has_gpu=has_gpu)
    run = replace(base, parallel=ParallelConfig()).with_overrides(
        [
            f"model.decoder.num_layers={options.layers}",
            "model.vision.num_layers=1",
            "training.rows_per_step=1",
            "training.recompute=none",
            f"rollout.max_sequences={options.answers}",
            *options.set,
        ]
    )
    return generating_run(run, 1)


@contextmanager
def _built(run: RunConfig, grid: Grid, device: torch.device) -> Iterator[KeyeModel]:
    engine = uses_transformer_engine(run.training, has_gpu=device.type == "cuda")
    fusions = choose_fusions(
        run.training, has_gpu=device.type == "cuda", uses_transformer_engine=engine
    )
    model = build_model(
        run, grid, device, uses_transformer_engine=engine, fusions=fusions, learns=False
    )
    try:
        yield model
    finally:
        for wrapped in model.wrapped():
            # Autograd's hooks hold the wrapper in a cycle through C++.
            vars(wrapped).clear()


def _shared_fields(run: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return the fields that all lines share."""
    on_gpu = device.type == "cuda"
    return {
        "recipe": run.name,
        "layers": run.model.decoder.num_layers,
        "precision": run.training.precision,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "proves_speed": on_gpu,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformer_engine": transformer_engine_version(),
        **shared_fields("tools.benchmark_generate"),
    }


def _lines(name: str, measure: Measure, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a case, and one with the reason if it fails."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield from measure(bench)
    except torch.OutOfMemoryError:
        yield {"op": name, "error": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        yield {"op": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
