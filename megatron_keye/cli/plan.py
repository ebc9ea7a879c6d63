# SPDX-License-Identifier: Apache-2.0
"""Shows the ranks, stages, parameters and memory that a recipe needs; runs without a GPU.

    megatron-keye plan keye_30b_a3b --ranks 128
    megatron-keye plan keye_30b_a3b --set parallel.decoder.tensor=4 --json
    megatron-keye plan keye_tiny --ranks 4 --batch SAMPLES:STEP --suggest
    megatron-keye plan keye_30b_a3b --gpus 64 --gpu h200 --suggest

Ranks are numbered as by megatron-keye train, torchrun and srun; those that are alike share a line
(--json lists each). --batch plans one step: how much
each rank encodes, and its expected idle time; without SAMPLES it reads the recipe's samples.
--suggest simulates that step with several numbers of vision ranks. Expected times are counted
operations divided by an assumed speed of a device. Expected memory assumes packed rows full of
video; CUDA, NCCL and fragmentation add a few GiB, and what ViT activations that
parallel.vision.recompute=auto keeps take of the rest is not counted.

--gpus lists the fastest layouts of so many GPUs that fit, with why each takes its time, and the
settings of the first as training takes them; --suggest simulates the best few. Times come from
the work of each part and from rates of the GPU: known ones (--gpu) or those that megatron-keye
doctor --rates measured. Rows are a mix of texts, images and videos up to two hours, or those of
--batch. docs/plan.md compares predictions with measured runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_keye.checkpoint.hf.parameter_shapes import count_parameters, parameter_shapes
from megatron_keye.cli.arguments import add_count, add_json, add_recipe, chosen_run, make_parser
from megatron_keye.cli.plan_table import describe
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.parameters import stage_layers
from megatron_keye.estimate.prediction.machine import read_machine
from megatron_keye.estimate.prediction.machines import MACHINES
from megatron_keye.estimate.ranks import plan_ranks

if TYPE_CHECKING:
    from megatron_keye.estimate.workload import RowShape

_GPU = "h100"
_NEAR_RANKS = 128
"""How far from --ranks numbers are tried that would do."""
_NUM_SIMULATED = 3
"""Layouts that --suggest simulates."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye plan", __doc__)
    add_recipe(parser)
    add_count(
        parser,
        "--ranks",
        "ranks that will be started, for which the recipe chooses its degrees; default: the "
        "fewest that the recipe is made for",
    )
    parser.add_argument(
        "--labels",
        type=int,
        metavar="N",
        help="labelled tokens per packed row, which need logits; default: 1/64 of the row",
    )
    parser.add_argument("--batch", metavar="SAMPLES:STEP", help="plan this step, counted from 0")
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="simulate the best layouts of --gpus, or numbers of vision ranks for --batch",
    )
    add_count(parser, "--gpus", "list the layouts of so many GPUs that fit, the fastest first")
    parser.add_argument("--gpu", choices=MACHINES, help=f"what they are; default: {_GPU}")
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="rates of a machine, as megatron-keye doctor --rates measured them; what it lacks is "
        "that of --gpu",
    )
    add_json(parser)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Print the plan and return the exit status."""
    options = parse_arguments(arguments)
    if options.gpus is not None:
        sys.stdout.write(suggest(options))
        return 0
    for name, value in (("--rates", options.rates), ("--gpu", options.gpu)):
        if value is not None:
            raise UserError(f"{name}: got no --gpus, expected --gpus N with it")
    run = chosen_run(options, num_ranks=options.ranks or 1, has_gpu=True)
    if options.ranks not in (None, run.parallel.num_ranks):
        nearest = " or ".join(map(str, nearest_ranks(options)))
        raise UserError(
            f"--ranks: got {options.ranks}, expected {nearest or run.parallel.num_ranks}, since "
            f"the degrees of {options.recipe} for {options.ranks} ranks are "
            f"{run.parallel.describe()}; training would not start; change --ranks, or a degree "
            "with --set"
        )
    plan = make_plan(run, options.labels)
    if options.suggest and options.batch is None:
        raise UserError(
            "--suggest: got no --batch and no --gpus, expected --gpus N or --batch SAMPLES:STEP "
            "with it"
        )
    if options.batch is not None:
        plan["step"] = plan_step(run, options.batch, suggests=options.suggest)
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if options.json else describe(plan))
    return 0


def nearest_ranks(options: argparse.Namespace) -> list[int]:
    """Return the next lower and higher number of ranks that the recipe has degrees of."""

    def suits(num_ranks: int) -> bool:
        try:
            run = chosen_run(options, num_ranks=num_ranks, has_gpu=True)
        except UserError:
            return False
        return run.parallel.num_ranks == num_ranks

    below = range(options.ranks - 1, max(0, options.ranks - _NEAR_RANKS), -1)
    above = range(options.ranks + 1, options.ranks + _NEAR_RANKS)
    found = (next(filter(suits, numbers), None) for numbers in (below, above))
    return sorted(number for number in found if number is not None)


def suggest(options: argparse.Namespace) -> str:
    """Return the layouts of --gpus as text or JSON.

    Raises:
        UserError: For options that do not fit together, and where no layout does.
    """
    for name, value in (("--ranks", options.ranks), ("--labels", options.labels)):
        if value is not None:
            raise UserError(
                f"{name}: got {value} beside --gpus {options.gpus}, expected one of them"
            )
    run = chosen_run(options, num_ranks=options.gpus, has_gpu=True)
    if run.post_training.is_on:
        raise UserError(
            f"--gpus: got a run with post_training.kind={run.post_training.kind}, whose steps "
            "generate answers first, which is not predicted; expected a run on samples"
        )
    machine = MACHINES[options.gpu or _GPU]
    if options.rates is not None:
        machine = read_machine(options.rates, machine)
    # Late, since only this part of the command needs numpy.
    from megatron_keye.cli.plan_layouts import describe_layouts, plan_layouts
    from megatron_keye.estimate.layouts.suggest import suggest_layouts

    rows = step_rows(run, options.batch)
    found = suggest_layouts(
        run, rows, options.gpus, machine, num_simulated=_NUM_SIMULATED if options.suggest else 0
    )
    planned = plan_layouts(found, run, machine)
    if options.json:
        return json.dumps(planned, indent=2) + "\n"
    given = [options.recipe, *(word for one in options.set for word in ("--set", one))]
    return describe_layouts(planned, given)


def step_rows(run: RunConfig, batch: str | None) -> "list[RowShape]":
    """Return the sizes of the rows of the step that --batch names, or of a mix of samples."""
    import numpy as np

    from megatron_keye.estimate.length_mix import draw_rows

    if batch is None:
        generator = np.random.default_rng(0)
        return draw_rows(generator, run.training.rows_per_step, run.data.row_tokens)
    from megatron_keye.estimate.step_summary import read_rows

    run, number = with_batch(run, batch)
    return read_rows(run, number)


def make_plan(run: RunConfig, num_labels: int | None = None) -> dict[str, Any]:
    """Return everything that the command shows but the step of --batch.

    Args:
        run: The run.
        num_labels: Labelled tokens per row; None for 1/64 of the row.
    """
    counts = count_parameters(parameter_shapes(run.model))
    return {
        "recipe": run.name,
        "grid": run.parallel.describe(),
        "num_ranks": run.parallel.num_ranks,
        "parameters_total": sum(counts.values()),
        **{f"parameters_{part}": count for part, count in counts.items()},
        "layers_per_stage": [
            len(stage_layers(run, stage)) for stage in range(run.parallel.decoder.pipeline)
        ],
        "ranks": [vars(rank) for rank in plan_ranks(run, num_labels)],
    }


def plan_step(run: RunConfig, batch: str, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of the step that --batch names.

    Args:
        run: The run.
        batch: SAMPLES:STEP.
        suggests: Whether several numbers of vision ranks are compared.

    Raises:
        UserError: For a batch that is not SAMPLES:STEP, or samples that cannot be read.
    """
    run, number = with_batch(run, batch)
    # Late, since only this part of the command imports video readers.
    from megatron_keye.estimate.step_summary import summarize_step

    return summarize_step(run, number, suggests=suggests)


def with_batch(run: RunConfig, batch: str) -> tuple[RunConfig, int]:
    """Return the run with the samples, and the step, that --batch names.

    Raises:
        UserError: For a batch that is not SAMPLES:STEP.
    """
    samples, colon, number = batch.rpartition(":")
    if not colon or not number.isdigit():
        raise UserError(f"--batch: got {batch!r}, expected SAMPLES:STEP with STEP counted from 0")
    data = replace(run.data, samples=samples or run.data.samples)
    return replace(run, data=data), int(number)
