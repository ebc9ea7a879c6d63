"""Shows what a recipe asks of a cluster: ranks, stages, parameters and memory, without a GPU.

    megatron-keye plan keye_30b_a3b --ranks 64 --set parallel.decoder.tensor=4 --json
    megatron-keye plan keye_tiny --ranks 4 --batch SAMPLES:STEP --suggest

Rank numbers are those that megatron-keye train, torchrun and srun give out. --batch shows which
rank encodes what in one step, and how long each is expected to idle; SAMPLES may be left out for
the recipe's own. --suggest plays several numbers of vision ranks on that step. Expected times are
counted operations over assumed speeds of a device. Expected memory is that of full rows of
pictures; a few GiB come on top for CUDA, NCCL and what the allocator cannot use.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_keye.checkpoint.hf.parameter_shapes import count_parameters, parameter_shapes
from megatron_keye.cli.arguments import add_recipe, chosen_run, make_parser, positive_integer
from megatron_keye.cli.plan_table import describe
from megatron_keye.cli.status import tells_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.parameters import stage_layers
from megatron_keye.estimate.ranks import plan_ranks


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("megatron-keye plan", __doc__)
    add_recipe(parser)
    parser.add_argument(
        "--ranks",
        type=positive_integer,
        default=1,
        metavar="N",
        help="ranks that the recipe may choose its degrees for; default: 1",
    )
    parser.add_argument(
        "--labels",
        type=int,
        metavar="N",
        help="labelled tokens of a row, for its memory; default: a 64th",
    )
    parser.add_argument("--batch", metavar="SAMPLES:STEP", help="plan this step, from 0")
    parser.add_argument(
        "--suggest", action="store_true", help="how many vision ranks suit the step of --batch"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


@tells_user_errors
def main(arguments: Sequence[str]) -> int:
    """Plan, and return the exit status."""
    options = parse_arguments(arguments)
    run = chosen_run(options, num_ranks=options.ranks, has_gpu=True)
    plan = make_plan(run, options.labels)
    if options.suggest and options.batch is None:
        raise UserError("--suggest: got no --batch, expected --batch SAMPLES:STEP beside it")
    if options.batch is not None:
        plan["step"] = plan_step(run, options.batch, suggests=options.suggest)
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if options.json else describe(plan))
    return 0


def make_plan(run: RunConfig, num_labels: int | None = None) -> dict[str, Any]:
    """Return everything that the command shows.

    Args:
        run: The run.
        num_labels: Labelled tokens of a row; a 64th of it when left out.
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
        suggests: Whether other numbers of vision ranks are tried.

    Raises:
        UserError: For a batch that is not SAMPLES:STEP, or samples that cannot be read.
    """
    samples, colon, number = batch.rpartition(":")
    if not colon or not number.isdigit():
        raise UserError(f"--batch: got {batch!r}, expected SAMPLES:STEP with a step from 0")
    # Late, since the grid needs no reader of videos.
    from megatron_keye.estimate.step_summary import summarize_step

    data = replace(run.data, samples=samples or run.data.samples)
    return summarize_step(replace(run, data=data), int(number), suggests=suggests)
