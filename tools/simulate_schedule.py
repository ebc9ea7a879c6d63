"""Plays the heterogeneous schedule on a mix of lengths: idle time, and what balance is worth.

    python tools/simulate_schedule.py keye_30b_a3b [--ranks 8 64 512] [--steps 2] [--json]

No GPU is needed: the plan is the one that training makes, the times are counted operations over
assumed speeds (--vision-tflops, --decoder-tflops). Compared with the balanced schedule are the ViT
on the first pipeline stage, and pictures dealt out by documents, as data parallelism over samples
does, or by their number, with rows as they come. Dedicated vision ranks stand beside the decoder;
rank-seconds make different numbers of ranks comparable.
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where the package is not installed
warnings.filterwarnings("ignore")  # Megatron-Core tells what is not installed; nothing runs here

from megatron_keye.config import (  # noqa: E402
    DecoderParallel,
    ParallelConfig,
    RunConfig,
)
from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.estimate.forecast import (  # noqa: E402
    Forecast,
    RowShape,
    Speeds,
    balance_shapes,
    plan_balanced,
    plan_dealt,
    try_vision_ranks,
)
from megatron_keye.estimate.simulate import Simulated  # noqa: E402
from megatron_keye.plan.step import PictureSlot  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402

USER_ERROR = 2
MERGE = 4
"""Patches of one token."""


@dataclass(frozen=True)
class Kind:
    """One kind of sample in the mix."""

    name: str
    share: float
    """Of all samples."""
    text: tuple[int, int]
    """Fewest and most text tokens, drawn evenly on a logarithmic scale."""
    pictures: tuple[int, int] = (0, 0)
    """Fewest and most pictures, likewise."""
    tokens: tuple[int, int] = (0, 0)
    """Fewest and most tokens of one of its pictures, likewise, equal within a sample."""


# At 2 frames a second; long videos are held to 184,320 tokens (data.frames), which leaves 102
# tokens a frame of 15 minutes and 2,880 frames of 64 tokens of 2 hours.
MIX = (
    Kind("text", 0.45, (200, 16_000)),
    Kind("images", 0.35, (50, 1_000), (1, 4), (64, 4_096)),
    Kind("15 s clips", 0.17, (50, 500), (30, 30), (64, 256)),
    Kind("15 min videos", 0.02, (100, 2_000), (1_800, 1_800), (64, 102)),
    Kind("2 h videos", 0.01, (100, 4_000), (2_880, 2_880), (64, 64)),
)

GRIDS = {
    8: DecoderParallel(context=8, expert=8),
    64: DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, virtual_stages=6),
    512: DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, virtual_stages=6, data=8),
}
"""Decoders on all ranks, by their number."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tools/simulate_schedule.py", description=__doc__)
    parser.add_argument("recipe", help=f"one of: {', '.join(recipe_names())}")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], choices=GRIDS)
    parser.add_argument("--steps", type=int, default=2, help="steps that are averaged")
    parser.add_argument("--vision-tflops", type=float, default=Speeds.vision_tflops)
    parser.add_argument("--decoder-tflops", type=float, default=Speeds.decoder_tflops)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Simulate, and return the exit code."""
    options = parse_arguments(arguments)
    speeds = Speeds(vision_tflops=options.vision_tflops, decoder_tflops=options.decoder_tflops)
    try:
        recipe = load_recipe(options.recipe)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    results = []
    for num_ranks in options.ranks:
        run = recipe(num_ranks=num_ranks, has_gpu=True)
        results += compare(with_grid(run, num_ranks), options.steps, speeds)
    sys.stdout.write(json.dumps(results, indent=2) + "\n" if options.json else describe(results))
    return 0


def with_grid(run: RunConfig, num_ranks: int) -> RunConfig:
    """Put a recipe on a decoder of that many ranks, with 16 rows a replica."""
    degrees = GRIDS[num_ranks]
    training = replace(run.training, rows_per_step=16 * degrees.data)
    return replace(run, parallel=ParallelConfig(decoder=degrees), training=training)


def compare(run: RunConfig, num_steps: int, speeds: Speeds) -> list[dict[str, Any]]:
    """Return what each schedule comes to, averaged over steps of the mix."""
    played: dict[str, list[Simulated]] = {}
    generator = np.random.default_rng(0)
    for _ in range(num_steps):
        rows = draw_rows(generator, run.training.rows_per_step, run.data.row_tokens)
        for name, step in play_all(rows, run, speeds).items():
            played.setdefault(name, []).append(step)
    ours = _rank_seconds(played["colocated, balanced"])
    return [
        {
            "ranks": len(steps[0].spans),
            "schedule": name,
            "step_seconds": sum(step.seconds for step in steps) / len(steps),
            "idle_share": sum(step.mean_idle_share for step in steps) / len(steps),
            "rank_seconds_over_balanced": _rank_seconds(steps) / ours,
        }
        for name, steps in played.items()
    ]


def play_all(rows: list[RowShape], run: RunConfig, speeds: Speeds) -> dict[str, Simulated]:
    """Return every schedule's outcome for one batch."""
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


def draw_rows(generator: np.random.Generator, count: int, row_tokens: int) -> list[RowShape]:
    """Draw samples of the mix and pack them, in order, into rows."""
    rows: list[RowShape] = []
    lengths: list[int] = []
    pictures: list[PictureSlot] = []
    while len(rows) < count:
        text, sizes = _draw_sample(generator)
        # Each picture stands between two tokens of its own.
        length = text + sum(size + 2 for size in sizes)
        filled = sum(lengths)
        if filled + length > row_tokens:
            rows.append(_row(lengths, pictures, row_tokens))
            lengths, pictures, filled = [], [], 0
        start = filled + 1
        for size in sizes:
            pictures.append(
                PictureSlot(row=0, index=0, start=start, num_patches=MERGE * size, num_tokens=size)
            )
            start += size + 2
        lengths.append(length)
    return rows


def _draw_sample(generator: np.random.Generator) -> tuple[int, list[int]]:
    kind = MIX[int(generator.choice(len(MIX), p=[kind.share for kind in MIX]))]

    def draw(low: int, high: int) -> int:
        return round(np.exp(generator.uniform(np.log(low), np.log(high)))) if high else 0

    return draw(*kind.text), [draw(*kind.tokens)] * draw(*kind.pictures)


def _row(lengths: list[int], pictures: list[PictureSlot], row_tokens: int) -> RowShape:
    padding = row_tokens - sum(lengths)
    documents = (*lengths, padding) if padding else tuple(lengths)
    return RowShape(document_lengths=documents, pictures=tuple(pictures))


def describe(results: list[dict[str, Any]]) -> str:
    """Return the table as text."""
    lines = [f"{'ranks':>5}  {'schedule':<34}{'step':>9}{'idle':>8}{'rank-seconds':>14}"]
    for result in results:
        lines.append(
            f"{result['ranks']:>5}  {result['schedule']:<34}{result['step_seconds']:>7.1f} s"
            f"{result['idle_share']:>8.1%}{result['rank_seconds_over_balanced']:>13.2f}x"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
