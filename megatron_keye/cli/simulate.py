# SPDX-License-Identifier: Apache-2.0
"""Simulates the schedule on a mix of sample lengths: step and idle times, balanced or not.

    megatron-keye simulate keye_30b_a3b
    megatron-keye simulate keye_30b_a3b --ranks 64 16384 --steps 1 --balanced-only --json
    megatron-keye simulate keye_30b_a3b --ranks 96 --set parallel.decoder.pipeline=2 \\
        --set parallel.decoder.context=8

No GPU is needed: the plan is the one that training makes; times are counted operations divided by
assumed speeds (--vision-tflops, --decoder-tflops), and bytes by those of links. Balanced
schedules, with vision colocated or on dedicated ranks, are compared with the ViT on the first
pipeline stage, and with images and frames assigned by document, as under data parallelism, or by
count, with rows in their original order. "ends shared": the decoder's ranks encode the first and
last micro-batches (parallel.vision.shared_micro_batches). Dedicated vision ranks are additional,
so rank-seconds, relative to the first line, compare best. Every replica has rows of its own.

Degrees are those of --set parallel.decoder.*, with as many replicas as make up the ranks; without
any, a layout of keye_30b_a3b: context 8 below 64 ranks, tensor 2, context 8 and 4 stages of 6
virtual ones from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_keye.cli.arguments import add_count, add_json, add_recipe, chosen_run, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import DecoderParallel, ParallelConfig, RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.forecast import Forecast, Speeds, play_best_dedicated
from megatron_keye.estimate.length_mix import draw_rows
from megatron_keye.estimate.simulate import Simulated
from megatron_keye.estimate.traffic import Links
from megatron_keye.estimate.workload import (
    RowShape,
    balance_shapes,
    plan_balanced,
    plan_dealt,
)

_SMALL = DecoderParallel(context=8, expert=8)
_LARGE = DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, virtual_stages=6)
_MOST_RANKS = 16_384
_RATES = (
    ("--vision-tflops", Speeds.vision_tflops, "assumed TFLOP/s of a GPU on vision work"),
    ("--decoder-tflops", Speeds.decoder_tflops, "assumed TFLOP/s of a GPU on decoder work"),
    ("--node-gigabytes", Links.node_gigabytes_per_second, "assumed GB/s of a GPU in its node"),
    ("--link-gigabytes", Links.link_gigabytes_per_second, "assumed GB/s of a GPU to other nodes"),
)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye simulate", __doc__)
    add_recipe(parser)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 64, 512],
        metavar="N",
        help=f"numbers of decoder ranks to simulate, 8 to {_MOST_RANKS:,}; default: 8 64 512",
    )
    add_count(parser, "--steps", "steps to simulate and average", default=2)
    add_count(parser, "--rows", "rows of a replica and step", default=16)
    for name, default, meaning in _RATES:
        parser.add_argument(
            name,
            type=_rate,
            default=default,
            metavar="X",
            help=f"{meaning}; default: {default:g}",
        )
    add_count(parser, "--node-ranks", "ranks of a node", default=Links.ranks_per_node)
    parser.add_argument(
        "--balanced-only", action="store_true", help="leave out what is not balanced"
    )
    add_json(parser)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Simulate every schedule and return the exit status."""
    options = parse_arguments(arguments)
    speeds = Speeds(
        vision_tflops=options.vision_tflops,
        decoder_tflops=options.decoder_tflops,
        links=Links(
            ranks_per_node=options.node_ranks,
            node_gigabytes_per_second=options.node_gigabytes,
            link_gigabytes_per_second=options.link_gigabytes,
        ),
    )
    sets_degrees = any(text.startswith("parallel.decoder.") for text in options.set)
    runs = []
    for num_ranks in options.ranks:
        if not 8 <= num_ranks <= _MOST_RANKS:
            raise UserError(f"--ranks: got {num_ranks}, expected 8 to {_MOST_RANKS}")
        run = chosen_run(options, num_ranks=num_ranks, has_gpu=True)
        degrees = run.parallel.decoder if sets_degrees else None
        runs.append(with_grid(run, num_ranks, degrees, rows_per_replica=options.rows))
    results = []
    for run in runs:
        results += compare(run, options.steps, speeds, balanced_only=options.balanced_only)
    sys.stdout.write(json.dumps(results, indent=2) + "\n" if options.json else describe(results))
    return 0


def with_grid(
    run: RunConfig,
    num_ranks: int,
    degrees: DecoderParallel | None = None,
    *,
    rows_per_replica: int = 16,
) -> RunConfig:
    """Return the run on so many decoder ranks.

    Args:
        run: The run.
        num_ranks: Ranks of the decoder.
        degrees: Of one replica; None for a layout of keye_30b_a3b.
        rows_per_replica: Rows of each replica in a step.

    Raises:
        UserError: When replicas of these degrees do not make up the ranks, or do not fit the run.
    """
    if degrees is None:
        degrees = _LARGE if num_ranks >= _LARGE.num_ranks else _SMALL
    of_replica = degrees.num_ranks // degrees.data
    if num_ranks % of_replica:
        raise UserError(
            f"--ranks: got {num_ranks}, expected a multiple of {of_replica}, the ranks of a "
            f"replica (tensor {degrees.tensor} x pipeline {degrees.pipeline} x context "
            f"{degrees.context}); change it, or the degrees with --set parallel.decoder.tensor, "
            "pipeline and context"
        )
    data = num_ranks // of_replica
    training = replace(run.training, rows_per_step=rows_per_replica * data)
    parallel = ParallelConfig(decoder=replace(degrees, data=data))
    return replace(run, parallel=parallel, training=training)


def compare(
    run: RunConfig, num_steps: int, speeds: Speeds, *, balanced_only: bool = False
) -> list[dict[str, Any]]:
    """Return step and idle times of each schedule, averaged over random steps.

    Args:
        run: Sizes and degrees.
        num_steps: Steps, of rows that differ.
        speeds: Speeds of a device.
        balanced_only: Whether to leave out schedules that are not balanced.
    """
    started = time.perf_counter()
    simulated: dict[str, list[Simulated]] = {}
    generator = np.random.default_rng(0)
    for _ in range(num_steps):
        rows = draw_rows(generator, run.training.rows_per_step, run.data.row_tokens)
        schedules = simulate_balanced(rows, run, speeds)
        if not balanced_only:
            schedules |= simulate_plain(rows, run, speeds)
        for name, step in schedules.items():
            simulated.setdefault(name, []).append(step)
    balanced = _rank_seconds(simulated["colocated, balanced"])
    wall_seconds = time.perf_counter() - started
    return [
        {
            "ranks": steps[0].num_ranks,
            "schedule": name,
            "step_seconds": sum(step.seconds for step in steps) / len(steps),
            "idle_share": sum(step.mean_idle_share for step in steps) / len(steps),
            "rank_seconds_over_balanced": _rank_seconds(steps) / balanced,
            "simulated_in_seconds": wall_seconds,
        }
        for name, steps in simulated.items()
    ]


def simulate_balanced(
    rows: list[RowShape], run: RunConfig, speeds: Speeds
) -> dict[str, Simulated]:
    """Simulate one batch under the schedules of training."""
    balanced = balance_shapes(rows, run)
    num_micro_batches = len(rows) // run.parallel.decoder.data
    ends = min(run.parallel.decoder.pipeline, num_micro_batches // 2)
    return {
        "colocated, balanced": Forecast(balanced, run, speeds).play(plan_balanced(balanced, run)),
        "dedicated, balanced": play_best_dedicated(rows, run, speeds),
        "dedicated, ends shared": play_best_dedicated(
            rows, run, speeds, shared_micro_batches=ends
        ),
    }


def simulate_plain(rows: list[RowShape], run: RunConfig, speeds: Speeds) -> dict[str, Simulated]:
    """Simulate one batch under schedules that are not balanced."""
    plain = Forecast(rows, run, speeds)
    return {
        "colocated, pictures by document": plain.play(plan_dealt(rows, run, deal="documents")),
        "colocated, pictures by count": plain.play(plan_dealt(rows, run, deal="counts")),
        "ViT on the first stage": plain.play_on_first_stage(),
    }


def _rank_seconds(steps: list[Simulated]) -> float:
    return sum(step.seconds * step.num_ranks for step in steps)


def _rate(text: str) -> float:
    """Parse a number above 0.

    Raises:
        ArgumentTypeError: For any other text.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return rate


def describe(results: list[dict[str, Any]]) -> str:
    """Return the results as a text table."""
    lines = [f"{'ranks':>6}  {'schedule':<34}{'step':>9}{'idle':>8}{'rank-seconds':>14}"]
    for result in results:
        lines.append(
            f"{result['ranks']:>6}  {result['schedule']:<34}{result['step_seconds']:>7.1f} s"
            f"{result['idle_share']:>8.1%}{result['rank_seconds_over_balanced']:>13.2f}x"
        )
    return "\n".join(lines) + "\n"
