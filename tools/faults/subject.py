# SPDX-License-Identifier: Apache-2.0
"""The run that faults are tried on: one decoder rank and one vision rank, steps in a second.

MEGATRON_KEYE_FAULT names a fault that a rank brings about within itself, at a point that nobody
outside can hit: {"name": "raise", "rank": 1, "step": 3}. Ranks import this file to find their
recipe, and the fault is put in place then.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    FrameConfig,
    HealthConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionParallel,
)
from tools import needle_task

VARIABLE = "MEGATRON_KEYE_FAULT"
NUM_RANKS, NUM_STEPS, INTERVAL_STEPS = 2, 6, 2
SAMPLES = 12


def write_data(folder: Path) -> None:
    """Write the samples, their videos and the tokenizer."""
    needle_task.main([str(folder), "--samples", str(SAMPLES)])


def subject(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run; `data.samples` and `data.tokenizer` are set where it is started."""
    task = needle_task.dense(num_ranks=num_ranks, has_gpu=has_gpu)
    decoder = replace(task.model.decoder, num_layers=2, init_std=0.02)
    _install(json.loads(os.environ.get(VARIABLE, "{}")))
    return RunConfig(
        name="subject",
        device="cpu",
        parallel=ParallelConfig(vision=VisionParallel(placement="dedicated", num_ranks=1)),
        model=replace(task.model, decoder=decoder),
        data=DataConfig(
            samples="frames.train.jsonl",
            tokenizer="tokenizer",
            row_tokens=512,
            frames=FrameConfig(
                frames_per_second=1.0, min_tokens_per_frame=1, max_tokens_per_frame=1
            ),
        ),
        training=TrainingConfig(
            steps=NUM_STEPS,
            rows_per_step=1,
            checkpoint=CheckpointConfig(interval_steps=INTERVAL_STEPS),
            health=HealthConfig(max_bad_steps=1, on_irreproducible="stop"),
        ),
    )


def _install(fault: dict[str, Any]) -> None:
    """Put a fault in place, if it is for this rank."""
    if not fault or str(fault["rank"]) != os.environ.get("RANK"):
        return
    inside, call = _PLACES[fault["name"]]
    if inside == "step":
        from megatron_keye.training.step import TrainingStep

        working: Callable[..., Any] = TrainingStep.__call__

        def broken(step: TrainingStep, rows: Any, number: int, *more: Any) -> Any:
            if number + 1 == fault["step"]:
                call(step)
            return working(step, rows, number, *more)

        TrainingStep.__call__ = broken  # type: ignore[method-assign, assignment]
    else:
        _break_writing(fault["call"], call)


def _break_writing(number: int, call: Callable[[], None]) -> None:
    """Call a function at the n-th call of fsync, which only the saving of a checkpoint uses."""
    working, calls = os.fsync, 0

    def broken(file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            call()
        working(file)

    os.fsync = broken  # type: ignore[assignment]


def _raise(step: Any) -> None:
    raise RuntimeError("a deliberate fault")


def _poison(kind: str) -> Callable[[Any], None]:
    """Return a function that puts one NaN into a rank's weights, moments or gradients."""

    def poison(step: Any) -> None:
        import torch

        from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of

        optimizer = step._optimizer
        shards = [shard for each in optimizers_of(optimizer) for shard in shards_of(each)]
        if kind == "weight":
            shards[0].weight.data.view(-1)[0] = torch.nan
        elif kind == "moment":
            shards[0].kept["exp_avg"].view(-1)[0] = torch.nan
        else:
            finish = optimizer.finish_gradients

            def finish_poisoned(divisor: float) -> None:
                finish(divisor)
                shards[0].weight.main_grad.view(-1)[0] = torch.nan  # type: ignore[attr-defined]
                optimizer.finish_gradients = finish

            optimizer.finish_gradients = finish_poisoned

    return poison


def _kill(step: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill_disk() -> None:
    import errno

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_PLACES: dict[str, tuple[str, Callable[..., None]]] = {
    "raise": ("step", _raise),
    "kill in a step": ("step", _kill),
    "NaN in a weight": ("step", _poison("weight")),
    "NaN in a moment": ("step", _poison("moment")),
    "NaN in a gradient": ("step", _poison("gradient")),
    "kill in a save": ("save", _kill),
    "no space in a save": ("save", _fill_disk),
}
"""Where faults within a rank come, and what they do there."""
