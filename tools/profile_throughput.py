"""Measures where a step's time goes: a timeline of all ranks, or the ViT's cost by frame size.

    python tools/profile_throughput.py keye_tiny --timeline OUT [--ranks N] [--steps N] [--set ...]
    python tools/profile_throughput.py keye_30b_a3b --fit-vision [--set ...]

--timeline trains some steps through launch/local.sh and leaves in OUT the run, timeline.json (for
chrome://tracing or ui.perfetto.dev) and timeline.svg, a picture of the last step. --fit-vision
times the recipe's ViT on frames of several sizes and says how to balance by it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where the package is not installed
warnings.filterwarnings("ignore")  # Megatron-Core tells at import what is not installed

import torch  # noqa: E402

from megatron_keye.config import RunConfig  # noqa: E402
from megatron_keye.config.megatron import weight_dtype  # noqa: E402
from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.observe import gantt  # noqa: E402
from megatron_keye.observe.timeline import Timeline, chrome_trace, read_steps  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402
from megatron_keye.vision import VisionTower  # noqa: E402

USER_ERROR = 2
_SIDES = (8, 16, 32, 64, 96)
"""Patches down and across the frames that --fit-vision times."""
_PATCHES = 9_216
"""Patches of one timed call, about a chunk's."""
_REPEATS = 5


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tools/profile_throughput.py", description=__doc__)
    parser.add_argument("recipe", help=f"one of: {', '.join(recipe_names())}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--timeline", type=Path, metavar="OUT", help="folder for what is recorded")
    what.add_argument("--fit-vision", action="store_true", help="time the ViT by frame size")
    parser.add_argument("--ranks", type=int, default=1, help="processes to start")
    parser.add_argument("--steps", type=int, default=3, help="steps; the last one is drawn")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, and return the exit code."""
    options = parse_arguments(arguments)
    has_gpu = torch.cuda.is_available()
    try:
        recipe = load_recipe(options.recipe)(num_ranks=options.ranks, has_gpu=has_gpu)
        run = recipe.with_overrides(options.set)
        if options.fit_vision:
            sys.stdout.write(fit_vision(run, torch.device("cuda" if has_gpu else "cpu")))
            return 0
        status = train(options)
        if status != 0:
            return status
        steps = read_steps(options.timeline / run.name)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    last = max(steps)
    title = f"{run.name}, step {last}: {run.parallel.describe()}"
    (options.timeline / "timeline.svg").write_text(gantt.draw(steps[last].spans, title))
    (options.timeline / "timeline.json").write_text(json.dumps(chrome_trace(steps)))
    sys.stdout.write(describe(steps, run))
    return 0


def train(options: argparse.Namespace) -> int:
    """Run the recipe with a recorder, and return the launcher's exit code."""
    settings = [
        *options.set,
        f"output_dir={options.timeline}",
        "training.records_timeline=true",
        f"training.steps={options.steps}",
        "training.checkpoint.resume=none",
        "training.checkpoint.saves_last=false",
    ]
    command = ["bash", str(ROOT / "launch/local.sh"), "--ranks", str(options.ranks)]
    command += [options.recipe, *(part for one in settings for part in ("--set", one))]
    environment = os.environ | {"PYTHON": os.environ.get("PYTHON", sys.executable)}
    return subprocess.run(command, env=environment, check=False).returncode


def describe(steps: dict[int, Timeline], run: RunConfig) -> str:
    """Return the figures of every step and the last one's ranks as text."""
    lines = [f"{'step':>5}{'seconds':>10}{'vision':>10}{'decoder':>10}{'over the longer':>17}"]
    for number, step in steps.items():
        vision, decoder = step.vision_seconds(), step.decoder_seconds()
        lines.append(
            f"{number:>5}{step.seconds:>10.3f}{vision:>10.3f}{decoder:>10.3f}"
            f"{step.seconds / max(vision, decoder):>16.2f}x"
        )
    last = steps[max(steps)]
    lines.append("vision, decoder: busy on the slowest rank, without waits for features")
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


def fit_vision(run: RunConfig, device: torch.device) -> str:
    """Time the ViT and return what was found as text."""
    tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    tower.reset_parameters(run.training.seed)
    tower = tower.to(device=device, dtype=weight_dtype(run))
    frames, seconds = [], []
    for side in _SIDES:
        patch_grids = [(side, side)] * max(1, _PATCHES // side**2)
        frames.append([side**2] * len(patch_grids))
        seconds.append(time_forward(tower, patch_grids, run.model.vision.patch_size))
    break_even = fit_break_even(frames, seconds)
    lines = [
        f"frames of {sizes[0]:>5} patches: {taken / sum(sizes) * 1e6:8.3f} us a patch"
        for sizes, taken in zip(frames, seconds, strict=True)
    ]
    lines.append(f"--set parallel.vision.attention_break_even_patches={break_even}")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def time_forward(tower: VisionTower, patch_grids: list[tuple[int, int]], patch_size: int) -> float:
    """Return the median seconds of a forward pass over frames of these patch_grids."""
    weight = next(tower.parameters())
    num_patches = sum(height * width for height, width in patch_grids)
    patches = torch.zeros(num_patches, 3, patch_size, patch_size).to(weight)
    taken = []
    for _ in range(_REPEATS + 1):
        _synchronize(weight.device)
        started = time.perf_counter()
        tower(patches, patch_grids)
        _synchronize(weight.device)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def fit_break_even(frames: Sequence[Sequence[int]], seconds: Sequence[float]) -> int:
    """Fit seconds = a x patches + b x the sum of squared frame sizes, and return a / b.

    Args:
        frames: Patches of each frame of every timed call.
        seconds: Of the calls.

    Raises:
        UserError: When larger frames were not slower, so that nothing can be fitted.
    """
    terms = np.array([[sum(sizes), sum(size**2 for size in sizes)] for sizes in frames], float)
    # Relative errors: each call counts the same.
    scaled = terms / np.asarray(seconds)[:, None]
    linear, quadratic = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
    if linear <= 0 or quadratic <= 0:
        raise UserError(
            f"--fit-vision: got {linear:.3g} s a patch and {quadratic:.3g} s a pair, expected "
            "both above 0; measure on an idle device"
        )
    return max(1, round(float(linear / quadratic)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
