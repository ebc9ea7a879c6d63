# SPDX-License-Identifier: Apache-2.0
"""Measures what timing a step costs: steps with a recorded timeline beside steps without.

    python -m tools.benchmark_profile_cost --out cost.jsonl
    python -m tools.benchmark_profile_cost --recipe keye_30b_a3b --layers 2 \
        --set data.samples=SAMPLES --set data.row_tokens=32768 --out cost.jsonl

One rank trains the same rows again and again, in turn with a timeline and without, so that
whatever else the machine does meets both: --rounds pairs of steps after three pairs that warm up,
about a minute on a GPU. The line has the medians of both, and of their ratios within a pair;
the processor's time too, which other programs on the machine disturb less.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_keye.cli.arguments import add_count, add_recipe_option, chosen_run, make_parser
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.profile import few_layers
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import RunConfig

WARM_UPS = 3


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Measure, write a line and return the exit status."""
    parser = make_parser("python -m tools.benchmark_profile_cost", __doc__)
    add_recipe_option(parser, default="keye_tiny")
    add_count(parser, "--layers", "decoder layers to run of the recipe's")
    add_count(parser, "--rounds", "pairs of steps", default=20)
    parser.add_argument("--out", type=Path, help="file to append a JSON line to")
    options = parser.parse_args(arguments)
    complete_environment(os.environ, local_ranks=1)
    quieten_libraries()
    import torch

    from tools.benchmark_lines import shared_fields, write_line

    has_gpu = torch.cuda.is_available()
    whole = chosen_run(options, num_ranks=1, has_gpu=has_gpu)
    options.set = [*few_layers(options.layers, 1, whole), *options.set]
    run = chosen_run(options, num_ranks=1, has_gpu=has_gpu)
    wall, processor = measure(run, options.rounds)
    line = {
        "op": "timeline_cost",
        "recipe": options.recipe,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "rounds": options.rounds,
        **medians("", wall),
        **medians("processor_", processor),
        "torch": torch.__version__,
        **shared_fields("tools.benchmark_profile_cost"),
    }
    write_line(line, options.out)
    return 0


def medians(prefix: str, pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the fields of seconds without and with a timeline."""
    plain, recorded = zip(*pairs, strict=True)
    return {
        f"{prefix}plain_ms": round(statistics.median(plain) * 1e3, 3),
        f"{prefix}recorded_ms": round(statistics.median(recorded) * 1e3, 3),
        f"{prefix}ratio": round(statistics.median(b / a for a, b in pairs), 4),
    }


def measure(
    run: RunConfig, rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the seconds of pairs of steps, without and with a timeline, and the processor's."""
    from megatron_keye.cli.rank import operators
    from megatron_keye.data.loader import RowLoader
    from megatron_keye.parallel.process import join, resolve_device
    from megatron_keye.training.step import TrainingStep
    from megatron_keye.training.trained_model import build_trained_model

    device = resolve_device(run.device, 0)
    process = join(device, rank=0, num_ranks=1, init_method="tcp://127.0.0.1:0")
    loader = RowLoader(run.data, run.model, run.training.seed)
    trained = build_trained_model(run, process, loader.probe_video, **operators(run, process))
    timed_run = replace(run, training=replace(run.training, records_timeline=True))
    recording = TrainingStep(
        timed_run,
        trained.grid,
        trained.model,
        trained.optimizer,
        source=trained.open_patches(),
        open_source=trained.open_patches,
        judge=trained.health.judge,
        stop=trained.stop,
        saving=trained.saving,
        clock=trained.clock,
        device=device,
    )
    rows = loader.next_rows(run.training.rows_per_step)
    wall, processor = [], []
    for number in range(WARM_UPS + rounds):
        seconds = {}
        for records in (False, True) if number % 2 else (True, False):
            step = recording if records else trained.step
            started = time.perf_counter(), time.process_time()
            step(rows, 0)
            if step.recorder is not None:
                step.recorder.spans()
            ended = time.perf_counter(), time.process_time()
            seconds[records] = [end - start for start, end in zip(started, ended, strict=True)]
        if number >= WARM_UPS:
            wall.append((seconds[False][0], seconds[True][0]))
            processor.append((seconds[False][1], seconds[True][1]))
    trained.close()
    return wall, processor


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
