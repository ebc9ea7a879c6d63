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
from dataclasses import dataclass
from typing import Any

from megatron_keye.checkpoint.hf.parameter_shapes import count_parameters, parameter_shapes
from megatron_keye.cli.arguments import add_recipe, chosen_run, make_parser, positive_integer
from megatron_keye.cli.plan_table import describe
from megatron_keye.cli.status import tells_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.memory import Held, Memory, decoder_memory, vision_memory
from megatron_keye.estimate.parameters import decoder_parameters, stage_layers, vision_parameters
from megatron_keye.plan.places import decoder_place


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of the job."""

    rank: int
    """Its number."""
    role: str
    """ "decoder", "vision", or "decoder and vision" where they share ranks."""
    place: dict[str, int]
    """Coordinates on the axes of its grid."""
    layers: list[int]
    """Decoder layers that it holds, from 0."""
    parameters: int
    """Parameters that it holds."""
    memory: dict[str, float]
    """GiB that it is expected to take, by what for."""


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
        # Late, since the grid needs no reader of videos.
        from megatron_keye.cli.step_forecast import forecast_step

        plan["step"] = forecast_step(run, options.batch, suggests=options.suggest)
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


def plan_ranks(run: RunConfig, num_labels: int | None) -> list[Rank]:
    """Return every rank: the decoder's first, dedicated vision ranks after them."""
    degrees, dedicated = run.parallel.decoder, run.parallel.vision.num_ranks
    role = "decoder" if dedicated else "decoder and vision"
    seeing = vision_parameters(run.model)
    patches = run.data.row_tokens * run.model.vision.merge_size**2
    labels = run.data.row_tokens // 64 if num_labels is None else num_labels
    stages: list[tuple[int, Memory]] = []
    for stage in range(degrees.pipeline):
        held = decoder_parameters(run, stage) + ([] if dedicated else seeing)
        memory = decoder_memory(run, stage, held, num_labels=labels, num_patches=patches)
        stages.append((_count(held), memory))
    ranks = []
    for rank in range(degrees.num_ranks):
        place = vars(decoder_place(degrees, rank))
        count, memory = stages[place["pipeline"]]
        ranks.append(
            Rank(
                rank=rank,
                role=role,
                place=place,
                layers=stage_layers(run, place["pipeline"]),
                parameters=count,
                memory=_gibibytes(memory),
            )
        )
    for number in range(dedicated):
        memory = vision_memory(run, seeing, num_patches=patches)
        ranks.append(
            Rank(
                rank=degrees.num_ranks + number,
                role="vision",
                place={"data": number},
                layers=[],
                parameters=_count(seeing),
                memory=_gibibytes(memory),
            )
        )
    return ranks


def _count(held: list[Held]) -> int:
    return sum(each.count for each in held)


def _gibibytes(memory: Memory) -> dict[str, float]:
    return {name: size / 2**30 for name, size in vars(memory).items()}
