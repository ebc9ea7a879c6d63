"""Shows what a recipe asks of a cluster: ranks, stages, parameters and memory, without a GPU.

Rank numbers are those that launch/local.sh, torchrun and srun give out.

    python tools/plan_grid.py keye_30b_a3b [--ranks 64] [--set SECTION.FIELD=VALUE] [--json]
    python tools/plan_grid.py keye_tiny --batch SAMPLES:STEP [--suggest]

--batch shows who encodes what in one step, and how long each rank is expected to idle; SAMPLES may
be left out for the recipe's own. --suggest plays several numbers of vision ranks on that step.
Expected times are counted operations over assumed speeds of a device. Expected memory is that of
full rows of pictures; a few GiB come on top for CUDA, NCCL and what the allocator cannot use.
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where the package is not installed

from megatron_keye.checkpoint.hf.parameter_shapes import (  # noqa: E402
    count_parameters,
    parameter_shapes,
)
from megatron_keye.config import RunConfig  # noqa: E402
from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.estimate.memory import Held, Memory, decoder_memory, vision_memory  # noqa: E402
from megatron_keye.estimate.parameters import (  # noqa: E402
    decoder_parameters,
    stage_layers,
    vision_parameters,
)
from megatron_keye.plan.places import decoder_place  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402

USER_ERROR = 2


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


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tools/plan_grid.py", description=__doc__)
    parser.add_argument("recipe", help=f"one of: {', '.join(recipe_names())}")
    parser.add_argument(
        "--ranks", type=int, default=1, help="ranks that the recipe may choose its degrees for"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument(
        "--labels", type=int, help="labelled tokens of a row, for its memory; default: a 64th"
    )
    parser.add_argument("--batch", metavar="SAMPLES:STEP", help="plan this step, from 0")
    parser.add_argument(
        "--suggest", action="store_true", help="how many vision ranks suit the step of --batch"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Plan, and return the exit code."""
    options = parse_arguments(arguments)
    try:
        run = load_recipe(options.recipe)(num_ranks=options.ranks, has_gpu=True)
        run = run.with_overrides(options.set)
        plan = make_plan(run, options.labels)
        if options.suggest and options.batch is None:
            raise UserError("--suggest: got no --batch, expected --batch SAMPLES:STEP beside it")
        if options.batch is not None:
            plan["step"] = plan_batch(run, options.batch, suggests=options.suggest)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if options.json else describe(plan))
    return 0


def make_plan(run: RunConfig, num_labels: int | None = None) -> dict[str, Any]:
    """Return everything that the tool shows.

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


def plan_batch(run: RunConfig, batch: str, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of one step and what it is expected to come to.

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
    # Late, since Megatron-Core and torch take seconds to import and the grid needs neither.
    warnings.filterwarnings("ignore")
    from megatron_keye.data.loader import RowLoader
    from megatron_keye.estimate import forecast

    data = replace(run.data, samples=samples or run.data.samples)
    loader = RowLoader(data, run.model, run.training.seed)
    for _ in range(int(number) + 1):
        read = loader.next_rows(run.training.rows_per_step)
    rows = forecast.balance_shapes([forecast.shape_of(row, run) for row in read], run)
    plan, speeds = forecast.plan_balanced(rows, run), forecast.Speeds()
    played = forecast.Forecast(rows, run, speeds).play(plan)
    tried = forecast.try_vision_ranks(rows, run, speeds) if suggests else []
    return {
        "step": int(number),
        "pictures": sum(len(chunk.pictures) for chunk in plan.chunks),
        "ranks": [
            {
                "chunks": len(plan.chunks_of(rank)),
                "patches": sum(plan.chunks[chunk].num_patches for chunk in plan.chunks_of(rank)),
                "idle_share": played.idle_share(rank),
            }
            for rank in played.spans
        ],
        "idle_share": played.mean_idle_share,
        "exchanges": [f"{e.kind} {e.micro_batch}" for e in plan.exchanges],
        "suggestions": [
            {
                "vision_ranks": number_of_ranks,
                "relative_seconds": step.seconds / played.seconds,
                "idle_share": step.mean_idle_share,
            }
            for number_of_ranks, step in tried
        ],
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


def _total(rank: dict[str, Any]) -> float:
    return float(sum(rank["memory"].values()))


def describe(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    lines = [f"{plan['recipe']}: {plan['grid']}", ""]
    for part in ("total", "decoder", "vision", "projector", "indexer"):
        lines.append(f"  {part:<10}{plan[f'parameters_{part}']:>18,} parameters")
    lines += ["", f"  layers per stage: {plan['layers_per_stage']}", ""]
    for rank in plan["ranks"]:
        place = " ".join(f"{axis} {number}" for axis, number in rank["place"].items())
        layers = f"layers {_ranges(rank['layers'])}" if rank["layers"] else "no layers"
        size = f"{_total(rank):>6.1f} GiB"
        lines.append(
            f"  rank {rank['rank']:>4}  {rank['role']:<19} {place:<46} "
            f"{rank['parameters']:>15,} parameters, {size}, {layers}"
        )
    fullest = max(plan["ranks"], key=_total)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in fullest["memory"].items())
    lines += ["", f"  expected of rank {fullest['rank']}, the fullest, in GiB: {parts}"]
    return "\n".join(lines) + "\n" + describe_step(plan.get("step"))


def describe_step(step: dict[str, Any] | None) -> str:
    """Return the plan of a step as text; nothing when there is none."""
    if step is None:
        return ""
    mean = step["idle_share"]
    lines = ["", f"  step {step['step']}: {step['pictures']} pictures, idle {mean:.1%} on average"]
    for rank, work in enumerate(step["ranks"]):
        lines.append(
            f"  rank {rank:>4}  encodes {work['patches']:>9,} patches in {work['chunks']:>4} "
            f"chunks, idle {work['idle_share']:>6.1%}"
        )
    lines.append(f"  exchanges in order: {', '.join(step['exchanges']) or 'none'}")
    for tried in step["suggestions"]:
        lines.append(
            f"  with {tried['vision_ranks']:>4} vision ranks: "
            f"{tried['relative_seconds']:.2f}x the time, idle {tried['idle_share']:.1%}"
        )
    if step["suggestions"]:
        best = step["suggestions"][0]["vision_ranks"]
        lines.append(f"  fewest rank-seconds: parallel.vision.num_ranks={best}, dedicated")
    return "\n".join(lines) + "\n"


def _ranges(layers: list[int]) -> str:
    """Write 0, 1, 4, 5 as 0-1, 4-5."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
