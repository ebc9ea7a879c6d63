# SPDX-License-Identifier: Apache-2.0
"""Times how long training stands still for a checkpoint, beside Megatron-Core's synchronous save.

    python -m tools.benchmark_save --out docs/benchmarks/save.jsonl

Saves a small model with a wide vocabulary and many experts, weights and optimizer, from one rank:
in each round with Megatron's `dist_checkpointing.save`, then here, waiting and not waiting. Beside
a save that is not waited for this process multiplies matrices; its speed then is compared with
the one that it has alone.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.config import RunConfig
from megatron_keye.recipes import load_recipe
from tools.benchmark_lines import shared_fields, write_line

SETTINGS = (
    "model.decoder.hidden_size=256",
    "model.decoder.num_layers=8",
    "model.decoder.experts.num_experts=64",
    "model.decoder.experts.intermediate_size=128",
    "training.checkpoint.keep=1",
)
ALONE_SECONDS = 1.0
Times = dict[str, float]
"""Figures of one save, by name."""


class Saves:
    """The saves of one model on one rank."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        """Build the model and its optimizer."""
        from megatron_keye.checkpoint.saver import Saver
        from megatron_keye.checkpoint.training_checkpoint import Progress
        from megatron_keye.model import build_model
        from megatron_keye.optim.optimizer import JointOptimizer
        from megatron_keye.parallel.grid import build_grid
        from megatron_keye.parallel.random import seed_rank

        self._run, self._grid = run, build_grid(run.parallel)
        seed_rank(run.training.seed, self._grid)
        self._model = build_model(run, self._grid, device, uses_transformer_engine=False)
        self._parts = (self._model, JointOptimizer(run, self._model, self._grid), self._grid)
        self._progress = Progress(step=0, updates=0, data={})
        self._savers = {is_beside: Saver(self._run_that(is_beside)) for is_beside in (True, False)}
        self._matrix = torch.randn(512, 512, device=device)

    def megatron(self) -> Times:
        """Save as Megatron-Core does."""
        from megatron.core import dist_checkpointing

        from megatron_keye.checkpoint.training_checkpoint import contents

        folder = self._run.folder / "megatron"
        folder.mkdir(parents=True)
        started = time.perf_counter()
        state = contents(self._run, *self._parts, self._progress).state
        dist_checkpointing.save(state, str(folder))
        seconds = time.perf_counter() - started
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
        return {"pause_s": seconds, "seconds": seconds, "gigabytes": size_bytes / 1e9}

    def waiting(self) -> Times:
        """Save as the project does, and wait."""
        return self._save(is_beside=False)

    def beside(self) -> Times:
        """Save as the project does, and go on."""
        end = time.perf_counter() + ALONE_SECONDS
        alone_speed = self._multiply(lambda: time.perf_counter() < end)
        times = self._save(is_beside=True)
        return times | {"speed_beside": times["speed_beside"] / alone_speed}

    def _save(self, *, is_beside: bool) -> Times:
        from megatron_keye.checkpoint.training_checkpoint import begin_save

        saver = self._savers[is_beside]
        self._progress = replace(self._progress, step=self._progress.step + 1)
        begin_save(saver, self._run_that(is_beside), *self._parts, self._progress)
        speed = self._multiply(lambda: saver.is_writing) if is_beside else 0.0
        saver.wait()
        (saved,) = saver.take_saved()
        times = {
            "pause_s": saved.pause_seconds,
            "seconds": saved.seconds,
            "gigabytes": saved.size_bytes / 1e9,
        }
        return times | ({"speed_beside": speed} if is_beside else {})

    def _run_that(self, is_beside: bool) -> RunConfig:
        training = self._run.training
        settings = replace(training.checkpoint, asynchronous=is_beside)
        return replace(self._run, training=replace(training, checkpoint=settings))

    def _multiply(self, goes_on: Callable[[], bool]) -> float:
        """Return how often a matrix is multiplied in a second."""
        started, count = time.perf_counter(), 0
        while goes_on() or not count:
            (self._matrix @ self._matrix).sum().item()
            count += 1
        return count / (time.perf_counter() - started)


def main() -> None:
    """Measure all ways, and write a line for each."""
    arguments = parse_arguments()
    quieten_libraries()
    from megatron_keye.parallel.process import resolve_device
    from megatron_keye.training.throughput import device_name
    from megatron_keye.verify.one_process import alone

    device = resolve_device("auto", 0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, alone(device):
        run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=device.type == "cuda")
        saves = Saves(run.with_overrides([*SETTINGS, f"output_dir={folder}"]), device)
        ways = {"Megatron-Core": saves.megatron, "waiting": saves.waiting, "beside": saves.beside}
        rounds = [{way: save() for way, save in ways.items()} for _ in range(arguments.rounds + 1)]
    for way in ways:
        write_line(summary(way, rounds) | {"device": device_name(device)}, arguments.out)


def summary(way: str, rounds: list[dict[str, Times]]) -> dict[str, Any]:
    """Return the line of one way: medians over all rounds but the first, and that one's pause."""
    first, *later = rounds

    def median(of: str, name: str) -> float:
        return statistics.median(each[of][name] for each in later)

    pause = median(way, "pause_s")
    return {
        "op": "save",
        "impl": way,
        **{name: round(median(way, name), 4) for name in first[way]},
        "first_pause_s": round(first[way]["pause_s"], 4),
        "share_of_megatron": round(pause / median("Megatron-Core", "pause_s"), 4),
        "rounds": len(later),
        "torch": torch.__version__,
        **shared_fields("tools.benchmark_save"),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_save", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="after a first one; default: 5")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
