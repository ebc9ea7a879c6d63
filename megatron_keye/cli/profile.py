"""Measures where a step's time goes: a timeline of all ranks, or the ViT's cost by frame size.

    megatron-keye profile keye_tiny --timeline OUT --ranks 4 --steps 3
    megatron-keye profile keye_30b_a3b --fit-vision

--timeline trains a few steps as megatron-keye train does and writes to OUT the run's folder,
timeline.json (for chrome://tracing or ui.perfetto.dev) and timeline.svg, a drawing of the last
step. --fit-vision times the recipe's ViT on frames of several sizes and prints the value of
parallel.vision.attention_break_even_patches for this device.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_keye.cli import local
from megatron_keye.cli.arguments import add_count, add_recipe, chosen_run, make_parser
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.files.disk import writing

if TYPE_CHECKING:
    from megatron_keye.observe.timeline import Timeline


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye profile", __doc__)
    add_recipe(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--timeline", type=Path, metavar="OUT", help="record a run in this folder")
    what.add_argument("--fit-vision", action="store_true", help="time the ViT by frame size")
    add_count(parser, "--ranks", "processes to start", default=1)
    add_count(parser, "--steps", "steps to train, of which the last is drawn", default=3)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Measure and return the exit status."""
    options = parse_arguments(arguments)
    # Late, since torch takes seconds to import.
    quieten_libraries()
    import torch

    has_gpu = torch.cuda.is_available()
    run = chosen_run(options, num_ranks=options.ranks, has_gpu=has_gpu)
    if options.fit_vision:
        from megatron_keye.cli.vision_fit import fit_vision

        sys.stdout.write(fit_vision(run, torch.device("cuda" if has_gpu else "cpu")))
        return 0
    return record(options, run)


def record(options: argparse.Namespace, run: RunConfig) -> int:
    """Train with a recorded timeline, draw it, and return the exit status."""
    from megatron_keye.observe import gantt
    from megatron_keye.observe.timeline import chrome_trace, read_steps

    status = train(options)
    if status != 0:
        return status
    steps = read_steps(options.timeline / run.name)
    last = max(steps)
    title = f"{run.name}, step {last}: {run.parallel.describe()}"
    drawing, trace = gantt.draw(steps[last].spans, title), json.dumps(chrome_trace(steps))
    with writing(options.timeline, "the timeline"):
        (options.timeline / "timeline.svg").write_text(drawing)
        (options.timeline / "timeline.json").write_text(trace)
    sys.stdout.write(describe(steps, run))
    return 0


def train(options: argparse.Namespace) -> int:
    """Train with a recorded timeline and return the launcher's exit status."""
    settings = [
        *options.set,
        f"output_dir={options.timeline}",
        "training.records_timeline=true",
        f"training.steps={options.steps}",
        "training.epochs=0",
        "training.checkpoint.resume=none",
        "training.checkpoint.saves_last=false",
    ]
    command = [sys.executable, "-m", "megatron_keye", "train", options.recipe]
    command += ["--ranks", str(options.ranks)]
    command += [part for one in settings for part in ("--set", one)]
    return local.launch(command, options.ranks)


def describe(steps: dict[int, "Timeline"], run: RunConfig) -> str:
    """Return the times of every step, and of each rank in the last one, as text."""
    lines = [f"{'step':>5}{'seconds':>10}{'vision':>10}{'decoder':>10}{'over the longer':>17}"]
    for number, step in steps.items():
        vision, decoder = step.vision_seconds(), step.decoder_seconds()
        lines.append(
            f"{number:>5}{step.seconds:>10.3f}{vision:>10.3f}{decoder:>10.3f}"
            f"{step.seconds / max(vision, decoder):>16.2f}x"
        )
    last = steps[max(steps)]
    lines.append("vision, decoder: busy seconds of the slowest rank, without waits for features")
    lines.append("over the longer: seconds of the step over the longer of these two")
    num_decoder = run.parallel.decoder.num_ranks
    for rank in sorted(last.spans):
        busy = last.busy_seconds(rank)
        role = "vision" if rank >= num_decoder else "decoder"
        lines.append(
            f"rank {rank:>4}  {role:<8} busy {busy:>8.3f} s, "
            f"idle {1 - busy / last.seconds:>6.1%}, "
            f"peak memory {last.peak_memory_mib[rank]:>9,.0f} MiB"
        )
    return "\n".join(lines) + "\n"
