# SPDX-License-Identifier: Apache-2.0
"""Trains keye_small on forged clips, then by rewards on a kind of question that it never saw.

    python -m tools.learn_small runs/learn_small

On one GPU, within ten minutes: forging, supervised training (keye_small), training on rewards of
its own answers (keye_small_rl). Each training is told to stop in time, and saves; rewards start
from the weights that were scored last. Both score the same questions about held-out clips as they
go on: "when", which the first one teaches, and the kind that is held out.

OUT gets the clips, both runs, their logs, and progress.jsonl, of which each line is written as
soon as it is known: scores by kind, rewards, and at last what these changed; then curves.svg, and
lines.jsonl for docs/benchmarks. Exit status 2, and what was written stays, when a part fails.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.cli.arguments import add_count, add_settings, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config.run import as_override
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.observe.curves import draw
from megatron_keye.recipes import load_recipe
from megatron_keye.recipes.keye_small import EVALUATION, FOLDER, HELD_OUT_KIND
from tools.benchmark_lines import shared_fields
from tools.learn_small_scores import (
    REWARD,
    TAUGHT_KIND,
    Watched,
    blind_scores,
    choose_questions,
)

CLIPS = (
    "--seconds 7 9 --rate 1 --plain --variable 0 --words 1 --blinking 0 --size 112 112 "
    "--shapes 1 --stay 3 --per-clip 8 --questions when at describe word --unanswered word "
    "--tokenizer"
)
"""What the recipe's clips show."""
_PROGRAM = [sys.executable, "-m", "megatron_keye"]
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 60.0
"""How long a training that was told to stop may take to end."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.learn_small", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_count(parser, "--samples", "clips to train on", default=16_000)
    add_count(parser, "--held-out", "clips of the questions that are scored", default=128)
    parser.add_argument(
        "--clips", metavar="OPTIONS", default=CLIPS, help="what clips show, as for forge_video"
    )
    add_count(parser, "--supervised-until", "second in which rewards take over", default=320)
    add_count(parser, "--until", "second in which all ends", default=565)
    add_settings(parser, "change a setting of both trainings; repeatable")
    for name in ("supervised", "rewarded"):
        parser.add_argument(
            f"--set-{name}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"change a setting of the {name} one; repeatable",
        )
    return parser.parse_args(arguments)


@dataclass(kw_only=True)
class Chain:
    """Runs one part after the other, and writes down how far it has come."""

    out: Path
    """Folder of all."""
    began: float = field(default_factory=time.monotonic)
    """When the first part began, by the clock of `time.monotonic`."""

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def note(self, part: str, **values: Any) -> None:
        """Write a line of progress.jsonl, and print it."""
        line = json.dumps({"part": part, "seconds": round(self.seconds, 1), **values}) + "\n"
        with writing(self.out, "progress"), (self.out / "progress.jsonl").open("a") as lines:
            lines.write(line)
        sys.stdout.write(line)
        sys.stdout.flush()

    def run(
        self,
        part: str,
        words: Sequence[str],
        until: float = math.inf,
        watched: Watched | None = None,
    ) -> None:
        """Run a command to its end, or until it is time to stop; its output goes to PART.log.

        Args:
            part: What it is called.
            words: Behind `megatron-keye`.
            until: Second of the chain in which it is told to save and stop.
            watched: Tells what it has written meanwhile.

        Raises:
            UserError: When it fails.
        """
        log, was_told = self.out / f"{part}.log", False
        with writing(log, "log"), log.open("w") as lines:
            process = subprocess.Popen([*_PROGRAM, *words], stdout=lines, stderr=lines)
        try:
            while (status := process.poll()) is None:
                time.sleep(_POLL_SECONDS)
                self._note_new(part, watched)
                if self.seconds > until + _SAVE_SECONDS:
                    process.kill()
                elif self.seconds > until and not was_told:
                    process.send_signal(signal.SIGTERM)
                    was_told = True
        finally:
            process.kill()
        self._note_new(part, watched)
        self.note(part, status=status, was_told_to_stop=was_told)
        if status and not was_told:
            raise UserError(f"{part}: ended with status {status}, expected 0; {log} says why")

    def _note_new(self, part: str, watched: Watched | None) -> None:
        for line in watched.new_lines() if watched else ():
            self.note(part, **line)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Run all parts and return the exit status."""
    options = parse_arguments(arguments)
    out: Path = options.out
    if out.exists():
        raise UserError(f"OUT: got {out}, which exists, expected a folder to make")
    with writing(out, "folder"):
        out.mkdir(parents=True)
    chain, clips = Chain(out=out), out / "clips"
    chain.note("begin", **shared_fields("tools.learn_small"))
    counts = ["--samples", str(options.samples), "--held-out", str(options.held_out)]
    chain.run("forge_video", ["forge_video", str(clips), *counts, *options.clips.split()])
    kinds = choose_questions(clips)
    chain.note("blind", **blind_scores(clips, kinds))
    weights: list[str] = []
    trainings: list[Watched] = []
    for recipe, until, settings in (
        ("keye_small", options.supervised_until, options.set_supervised),
        ("keye_small_rl", options.until, options.set_rewarded),
    ):
        words = [*_places(recipe, out), *weights, *options.set, *settings]
        run = load_recipe(recipe)(num_ranks=1, has_gpu=True).with_overrides(words)
        watched = Watched(folder=run.folder, kinds=kinds)
        overrides = [word for setting in words for word in ("--set", setting)]
        chain.run(recipe, ["train", recipe, "--ranks", "1", *overrides], until, watched)
        if not watched.scores:
            interval = run.training.evaluation.interval_steps
            raise UserError(
                f"{recipe}: got no scores in its time, expected those of step {interval}; give it "
                "more, or set training.evaluation.interval_steps"
            )
        trainings.append(watched)
        newest = str(checkpoint_folder(run, max(watched.scores)))
        weights = [as_override("training.checkpoint.weights", newest)]
    before, after = (each.scores[max(each.scores)][HELD_OUT_KIND] for each in trainings)
    chain.note("result", kind=HELD_OUT_KIND, before=before, after=after, lift=after - before)
    _record(out, trainings)
    return 0


def _record(out: Path, trainings: Sequence[Watched]) -> None:
    """Draw the curves of all trainings, and write their scores as a benchmark's lines."""
    shown = [f"{kind} mIoU" for kind in (TAUGHT_KIND, HELD_OUT_KIND)]
    picture = draw([each.curves() for each in trainings], [*shown, REWARD], "learn_small")
    with writing(out, "curves and lines"):
        (out / "curves.svg").write_text(picture)
        for each in trainings:
            each.write_lines(out / "lines.jsonl")


def _places(recipe: str, out: Path) -> list[str]:
    """Return the settings that make a recipe read and write below a folder."""
    run = load_recipe(recipe)(num_ranks=1, has_gpu=True)
    read = {
        "data.samples": run.data.samples,
        "data.tokenizer": run.data.tokenizer,
        "training.evaluation.samples": EVALUATION,
    }
    moved = {name: path.replace(FOLDER, f"{out}/clips", 1) for name, path in read.items()}
    return [as_override(name, path) for name, path in (moved | {"output_dir": str(out)}).items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
