"""Simulates the schedule on a mix of sample lengths: step and idle times, balanced or not.

    megatron-keye simulate keye_30b_a3b
    megatron-keye simulate keye_30b_a3b --ranks 64 512 --steps 4 --json

No GPU is needed: the plan is the one that training makes; times are counted operations divided by
assumed speeds (--vision-tflops, --decoder-tflops). Balanced schedules, with vision colocated or on
dedicated ranks, are compared with the ViT on the first pipeline stage, and with images and frames
assigned by document, as under data parallelism, or by count, with rows in their original order.
Dedicated vision ranks are additional, so rank-seconds, relative to the first line, compare best.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_keye.cli.arguments import add_count, add_json, add_recipe, chosen_run, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import DecoderParallel, ParallelConfig, RunConfig
from megatron_keye.estimate.dealt_plan import plan_dealt
from megatron_keye.estimate.forecast import (
    Forecast,
    RowShape,
    Speeds,
    balance_shapes,
    plan_balanced,
    try_vision_ranks,
)
from megatron_keye.estimate.length_mix import draw_rows
from megatron_keye.estimate.simulate import Simulated

GRIDS = {
    8: DecoderParallel(context=8, expert=8),
    64: DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, virtual_stages=6),
    512: DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, virtual_stages=6, data=8),
}
"""Degrees of the decoder, by its number of ranks."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye simulate", __doc__)
    add_recipe(parser)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=list(GRIDS),
        choices=GRIDS,
        help="numbers of decoder ranks to simulate; default: all",
    )
    add_count(parser, "--steps", "steps to simulate and average", default=2)
    for part, tflops in (("vision", Speeds.vision_tflops), ("decoder", Speeds.decoder_tflops)):
        parser.add_argument(
            f"--{part}-tflops",
            type=float,
            default=tflops,
            metavar="N",
            help=f"assumed TFLOP/s of a GPU on {part} work; default: {tflops:g}",
        )
    add_json(parser)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Simulate every schedule and return the exit status."""
    options = parse_arguments(arguments)
    speeds = Speeds(vision_tflops=options.vision_tflops, decoder_tflops=options.decoder_tflops)
    results = []
    for num_ranks in options.ranks:
        run = chosen_run(options, num_ranks=num_ranks, has_gpu=True)
        results += compare(with_grid(run, num_ranks), options.steps, speeds)
    sys.stdout.write(json.dumps(results, indent=2) + "\n" if options.json else describe(results))
    return 0


def with_grid(run: RunConfig, num_ranks: int) -> RunConfig:
    """Return the run on so many decoder ranks, with 16 rows per replica and step."""
    degrees = GRIDS[num_ranks]
    training = replace(run.training, rows_per_step=16 * degrees.data)
    return replace(run, parallel=ParallelConfig(decoder=degrees), training=training)


def compare(run: RunConfig, num_steps: int, speeds: Speeds) -> list[dict[str, Any]]:
    """Return step and idle times of each schedule, averaged over random steps."""
    simulated: dict[str, list[Simulated]] = {}
    generator = np.random.default_rng(0)
    for _ in range(num_steps):
        rows = draw_rows(generator, run.training.rows_per_step, run.data.row_tokens)
        for name, step in simulate_schedules(rows, run, speeds).items():
            simulated.setdefault(name, []).append(step)
    balanced = _rank_seconds(simulated["colocated, balanced"])
    return [
        {
            "ranks": len(steps[0].spans),
            "schedule": name,
            "step_seconds": sum(step.seconds for step in steps) / len(steps),
            "idle_share": sum(step.mean_idle_share for step in steps) / len(steps),
            "rank_seconds_over_balanced": _rank_seconds(steps) / balanced,
        }
        for name, steps in simulated.items()
    ]


def simulate_schedules(
    rows: list[RowShape], run: RunConfig, speeds: Speeds
) -> dict[str, Simulated]:
    """Simulate one batch under every schedule."""
    balanced = balance_shapes(rows, run)
    forecast = Forecast(balanced, run, speeds)
    plain = Forecast(rows, run, speeds)
    return {
        "colocated, balanced": forecast.play(plan_balanced(balanced, run)),
        "dedicated, balanced": try_vision_ranks(balanced, run, speeds)[0][1],
        "colocated, pictures by document": plain.play(plan_dealt(rows, run, deal="documents")),
        "colocated, pictures by count": plain.play(plan_dealt(rows, run, deal="counts")),
        "ViT on the first stage": plain.play_on_first_stage(),
    }


def _rank_seconds(steps: list[Simulated]) -> float:
    return sum(step.seconds * len(step.spans) for step in steps)


def describe(results: list[dict[str, Any]]) -> str:
    """Return the results as a text table."""
    lines = [f"{'ranks':>5}  {'schedule':<34}{'step':>9}{'idle':>8}{'rank-seconds':>14}"]
    for result in results:
        lines.append(
            f"{result['ranks']:>5}  {result['schedule']:<34}{result['step_seconds']:>7.1f} s"
            f"{result['idle_share']:>8.1%}{result['rank_seconds_over_balanced']:>13.2f}x"
        )
    return "\n".join(lines) + "\n"
