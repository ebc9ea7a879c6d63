"""Measures what timing a step costs: steps with a recorded timeline beside steps without.

    python -m tools.benchmark_profile_cost --out cost.jsonl
    python -m tools.benchmark_profile_cost --recipe keye_30b_a3b --layers 2 \
        --set data.samples=SAMPLES --set data.row_tokens=32768 --out cost.jsonl

One rank trains the same rows again and again, in turn with a timeline and without, so that
whatever else the machine does meets both: --rounds pairs of steps after three pairs that warm up,
about a minute on a GPU. The line has the medians of both, and of their ratios within a pair.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
    plain, recorded = measure(run, options.rounds)
    ratios = [mine / other for mine, other in zip(recorded, plain, strict=True)]
    line = {
        "op": "timeline_cost",
        "recipe": options.recipe,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "rounds": options.rounds,
        "plain_ms": round(statistics.median(plain) * 1e3, 3),
        "recorded_ms": round(statistics.median(recorded) * 1e3, 3),
        "ratio": round(statistics.median(ratios), 4),
        "torch": torch.__version__,
        **shared_fields("tools.benchmark_profile_cost"),
    }
    write_line(line, options.out)
    return 0


def measure(run: RunConfig, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of steps without and with a timeline, in pairs."""
    from megatron_keye.cli.rank import operators
    from megatron_keye.parallel.process import join, resolve_device
    from megatron_keye.training.parts import build_parts
    from megatron_keye.training.patch_source import open_patch_source
    from megatron_keye.training.step import TrainingStep

    device = resolve_device(run.device, 0)
    process = join(device, rank=0, num_ranks=1, init_method="tcp://127.0.0.1:0")
    parts = build_parts(run, process, **operators(run, process))
    timed_run = replace(run, training=replace(run.training, records_timeline=True))
    source = partial(open_patch_source, run, parts.model, device, parts.loader.probe_video)
    recording = TrainingStep(
        timed_run,
        parts.grid,
        parts.model,
        parts.optimizer,
        source=source(),
        open_source=source,
        judge=parts.health.judge,
        stop=parts.stop,
        saving=parts.saving,
        clock=parts.clock,
        device=device,
    )
    rows = parts.loader.next_rows(run.training.rows_per_step)
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(WARM_UPS + rounds):
        for records in (False, True) if number % 2 else (True, False):
            step = recording if records else parts.step
            started = time.perf_counter()
            step(rows, 0)
            if step.recorder is not None:
                step.recorder.spans()
            if number >= WARM_UPS:
                times[records].append(time.perf_counter() - started)
    parts.close()
    return times[False], times[True]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
