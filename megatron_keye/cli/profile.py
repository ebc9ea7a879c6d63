# SPDX-License-Identifier: Apache-2.0
"""Shows where the time and the memory of a run's steps go, by phase, by module and by rank.

    megatron-keye profile keye_tiny --out runs/profile --ranks 4
    megatron-keye profile keye_30b_a3b --out runs/two_layers --layers 2
    megatron-keye profile --compare runs/before/profile.json runs/after/profile.json
    megatron-keye profile keye_30b_a3b --fit-vision

Trains a few steps as megatron-keye train does: some warm up, the next ones are timed, and the last
ones are traced by torch's profiler, which slows them and tells which module each kernel belongs
to. The folder of --out gets profile.html (a page with pictures that needs nothing else),
profile.json (the same for programs), timeline.json (all timed steps on all ranks, for
chrome://tracing or ui.perfetto.dev) and timeline.svg, a drawing of the last timed step.
--keep-traces leaves the traces of torch's profiler in the run's folder too.

--layers runs a few full-width decoder layers of a model that does not fit, one row a step, with
all ranks along the context axis; other degrees come by --set. What the whole model would take is
computed from them.

--compare says what became slower or faster. A difference within the ranges of the measurements is
none. --fit-vision times the recipe's ViT on frames of several sizes and prints the value of
parallel.vision.attention_break_even_patches for this device.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli import local
from megatron_keye.cli.arguments import (
    add_count,
    add_folder,
    add_recipe,
    chosen_run,
    make_parser,
)
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.config.check import check
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye profile", __doc__)
    add_recipe(parser, is_optional=True)
    add_folder(parser, "--out", "folder of the run and of what is found in it")
    add_count(parser, "--ranks", "processes to start", default=1)
    add_count(parser, "--warm-up", "steps before the timed ones", default=2)
    add_count(parser, "--steps", "steps to time", default=5)
    add_count(parser, "--traced", "steps to trace after them", default=3)
    add_count(parser, "--layers", "decoder layers to run of the recipe's")
    parser.add_argument("--keep-traces", action="store_true", help="keep torch's traces")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="two profiles"
    )
    parser.add_argument("--fit-vision", action="store_true", help="time the ViT by frame size")
    options = parser.parse_args(arguments)
    modes = [bool(options.out), bool(options.compare), options.fit_vision]
    if sum(modes) != 1 or bool(options.recipe) == bool(options.compare):
        parser.error("expected RECIPE with --out or --fit-vision, or --compare without RECIPE")
    return options


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Measure and return the exit status."""
    options = parse_arguments(arguments)
    if options.compare:
        from megatron_keye.cli.profile_table import describe_differences
        from megatron_keye.profiling.compare import compare
        from megatron_keye.profiling.profile import read_profile

        before, after = map(read_profile, options.compare)
        sys.stdout.write(describe_differences(compare(before, after)))
        return 0
    # Late, since torch takes seconds to import.
    quieten_libraries()
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # torch's profiler would print an error for the GPU that it misses.
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if options.fit_vision:
        from megatron_keye.cli.vision_fit import fit_vision

        run = chosen_run(options, num_ranks=options.ranks, has_gpu=has_gpu)
        sys.stdout.write(fit_vision(run, torch.device("cuda" if has_gpu else "cpu")))
        return 0
    return profile(options, has_gpu=has_gpu)


def profile(options: argparse.Namespace, *, has_gpu: bool) -> int:
    """Train the steps, write what is found in them, and return the exit status."""
    whole = chosen_run(options, num_ranks=options.ranks, has_gpu=has_gpu)
    check(
        not whole.post_training.is_on,
        "post_training.kind",
        whole.post_training.kind,
        "none, since a step that answers first is not profiled yet; add --set "
        "post_training.kind=none for the steps that learn from samples",
    )
    settings = [*few_layers(options.layers, options.ranks, whole), *options.set]
    every = [*settings, *step_settings(options)]
    options.set = every
    run = chosen_run(options, num_ranks=options.ranks, has_gpu=has_gpu)
    run.check_num_ranks(options.ranks)
    command = [sys.executable, "-m", "megatron_keye", "train", options.recipe]
    command += ["--ranks", str(options.ranks)]
    command += [part for one in every for part in ("--set", one)]
    status = local.launch(command, options.ranks)
    if status == 0:
        all_layers = f"model.decoder.num_layers={whole.model.decoder.num_layers}"
        whole = run.with_overrides([all_layers])
        report(options, run, settings, whole=whole if options.layers else None)
    return status


def report(
    options: argparse.Namespace, run: RunConfig, settings: list[str], *, whole: RunConfig | None
) -> None:
    """Write all files of a finished run, and show the main figures."""
    from megatron_keye.cli.profile_table import describe_overlap, describe_profile
    from megatron_keye.observe import gantt
    from megatron_keye.observe.timeline import chrome_trace, read_steps
    from megatron_keye.profiling.build import build_profile
    from megatron_keye.profiling.page import draw_page
    from megatron_keye.training.step_profiler import STEP_RANGE

    found = build_profile(
        run,
        step_range=STEP_RANGE,
        num_warm_up=options.warm_up,
        num_timed=options.steps,
        settings=settings,
        whole=whole,
    )
    first, end = options.warm_up, options.warm_up + options.steps
    steps = {n: step for n, step in read_steps(run.folder).items() if first <= n < end}
    last = steps[max(steps)].spans
    title = f"{run.name}, step {max(steps) + 1}: {run.parallel.describe()}"
    out: Path = options.out
    with writing(out, "the profile"):
        (out / "profile.json").write_text(found.to_json())
        (out / "profile.html").write_text(draw_page(found, last))
        (out / "timeline.svg").write_text(gantt.draw(last, title))
        (out / "timeline.json").write_text(json.dumps(chrome_trace(steps)))
        if not options.keep_traces:
            shutil.rmtree(run.folder / "profiler")
    sys.stdout.write(describe_profile(found) + describe_overlap(steps, run))
    sys.stdout.write(f"page: {out / 'profile.html'}\n")


def few_layers(layers: int | None, num_ranks: int, whole: RunConfig) -> list[str]:
    """Return the settings that run a few decoder layers of a recipe.

    Args:
        layers: How many; None for all, which changes nothing.
        num_ranks: Ranks, all along the context axis.
        whole: The recipe's run.

    Raises:
        UserError: When the model has fewer.
    """
    if layers is None:
        return []
    most = whole.model.decoder.num_layers
    check(layers <= most, "--layers", layers, f"at most {most}, those of the model")
    return [
        f"model.decoder.num_layers={layers}",
        *(f"parallel.decoder.{axis}=1" for axis in ("tensor", "pipeline", "data")),
        *(f"parallel.decoder.{axis}={num_ranks}" for axis in ("context", "expert")),
        "parallel.decoder.virtual_stages=1",
        "parallel.vision.placement=colocated",
        "parallel.vision.num_ranks=0",
        "parallel.vision.shared_micro_batches=0",
        "training.rows_per_step=1",
    ]


def step_settings(options: argparse.Namespace) -> list[str]:
    """Return the settings of the steps."""
    timed = options.warm_up + options.steps
    traced = [str(timed + number) for number in range(1, options.traced + 1)]
    if any(setting.startswith("training.profiler.") for setting in options.set):
        raise UserError("--set: training.profiler is what profile sets itself; use train for it")
    return [
        f"output_dir={options.out}",
        "training.records_timeline=true",
        f"training.steps={timed + options.traced}",
        "training.epochs=0",
        f"training.profiler.trace_steps={','.join(traced)}",
        "training.profiler.ranks=[]",
        "training.checkpoint.resume=none",
        "training.checkpoint.saves_last=false",
        # Neither belongs to a step.
        "training.evaluation.samples=",
        "training.evaluation.interval_steps=0",
        "training.validation.patience=0",
        "data.validation=",
    ]
