# SPDX-License-Identifier: Apache-2.0
"""Forges clips, trains keye_small on them, and lets rewards teach it a kind of question it never saw.

    python -m tools.learn_small runs/learn_small

On one GPU, within ten minutes: forging, supervised training (keye_small), training on rewards of
its own answers (keye_small_rl). Each training is told to stop in time, and saves; rewards start
from the weights that were scored last. Both score the same held-out questions as they train,
"when", which the first one teaches, and the kind that is held out.

OUT gets the clips, both runs, their logs, and progress.jsonl, of which each line is written as soon
as it is known: scores by kind, rewards, and at last what rewards changed. Exit status 1 when a part
fails; what it wrote stays.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.cli.arguments import add_count, add_settings, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import RunConfig
from megatron_keye.config.run import as_override
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe
from megatron_keye.recipes.keye_small import EVALUATION, FOLDER, HELD_OUT_KIND
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.question_file import read_questions
from megatron_keye.scoring.summary import score_questions, summarize
from tools.benchmark_lines import shared_fields

CLIPS = (
    "--seconds 16 20 --rate 1 --plain --variable 0 --words 1 --blinking 0 --size 224 224 "
    "--shapes 2 --stay 4 --per-clip 8 --questions when at describe word --unanswered word "
    "--tokenizer"
)
"""What the recipe's clips show."""
TAUGHT_KIND = "when"
_NUM_TAUGHT = 64
"""Questions of TAUGHT_KIND that are scored, beside all of HELD_OUT_KIND."""
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 60.0
"""How long a training that was told to stop may take to end."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.learn_small", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_count(parser, "--samples", "clips to train on", default=12_000)
    add_count(parser, "--held-out", "clips of the questions that are scored", default=128)
    parser.add_argument("--clips", default=CLIPS, help="what clips show, as for forge_video")
    add_count(parser, "--supervised-until", "seconds after which rewards take over", default=260)
    add_count(parser, "--until", "seconds after which all stops", default=510)
    add_settings(parser, "change a setting of both runs; repeatable")
    for name in ("supervised", "rewarded"):
        parser.add_argument(
            f"--set-{name}", action="append", default=[], metavar="NAME=VALUE", help="... of one"
        )
    return parser.parse_args(arguments)


@dataclass
class _Progress:
    """Writes lines of what has happened, each with the seconds since the beginning."""

    file: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def note(self, part: str, **values: Any) -> None:
        line = json.dumps({"part": part, "seconds": round(self.seconds, 1), **values})
        with self.file.open("a") as lines:
            lines.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Run all parts and return the exit status."""
    options = parse_arguments(arguments)
    out: Path = options.out
    if out.exists():
        raise UserError(f"OUT: got {out}, which exists, expected a folder to make")
    out.mkdir(parents=True)
    progress = _Progress(out / "progress.jsonl")
    progress.note("begin", **shared_fields("tools.learn_small"))
    clips = out / "clips"
    counts = ["--samples", str(options.samples), "--held-out", str(options.held_out)]
    _run(["forge_video", str(clips), *counts, *options.clips.split()], out / "forge_video.log")
    kinds = choose_questions(clips)
    progress.note("forge_video", blind=_blind_scores(clips, kinds))
    scores: list[dict[str, float]] = []
    weights: list[str] = []
    for recipe, until, settings in (
        ("keye_small", options.supervised_until, options.set_supervised),
        ("keye_small_rl", options.until, options.set_rewarded),
    ):
        words = [*_places(recipe, out), *weights, *options.set, *settings]
        run = load_recipe(recipe)(num_ranks=1, has_gpu=True).with_overrides(words)
        scored = _train(recipe, words, run, until, progress, kinds)
        if not scored:
            raise UserError(
                f"{recipe}: ended before its first scores, expected some; see {out}/{recipe}.log"
            )
        step = max(scored)
        scores.append(scored[step])
        best = checkpoint_folder(run, step)
        weights = [as_override("training.checkpoint.weights", str(best))]
    before, after = (each[HELD_OUT_KIND] for each in scores)
    progress.note("result", kind=HELD_OUT_KIND, before=before, after=after, lift=after - before)
    return 0


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


def choose_questions(clips: Path) -> dict[str, str]:
    """Write the questions that rewards teach and those that are scored; return these' kinds."""
    lines = {
        part: [json.loads(line) for line in (clips / f"{part}.questions.jsonl").open()]
        for part in ("train", "held_out")
    }
    of_kind = {
        (part, kind): [line for line in lines[part] if line["kind"] == kind]
        for part in lines
        for kind in (TAUGHT_KIND, HELD_OUT_KIND)
    }
    taught = of_kind["held_out", TAUGHT_KIND][:_NUM_TAUGHT]
    scored = [*taught, *of_kind["held_out", HELD_OUT_KIND]]
    for name, chosen in (
        (f"{HELD_OUT_KIND}.jsonl", of_kind["train", HELD_OUT_KIND]),
        (Path(EVALUATION).name, scored),
    ):
        (clips / name).write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return {line["id"]: line["kind"] for line in scored}


def _blind_scores(clips: Path, kinds: Mapping[str, str]) -> dict[str, float | None]:
    """Return by kind what answers score that name the whole video."""
    by_kind: dict[str, list[Question]] = {}
    for question in read_questions(clips / Path(EVALUATION).name):
        by_kind.setdefault(kinds[question.id], []).append(question)
    return {
        kind: summarize(score_questions(asked, {}))[0].blind for kind, asked in by_kind.items()
    }


def _run(words: Sequence[str], log: Path) -> None:
    with log.open("w") as lines:
        process = subprocess.run(
            [sys.executable, "-m", "megatron_keye", *words],
            stdout=lines,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if process.returncode:
        raise UserError(f"{words[0]}: ended with status {process.returncode}; see {log}")


def _train(
    recipe: str,
    settings: Sequence[str],
    run: RunConfig,
    until: float,
    progress: _Progress,
    kinds: Mapping[str, str],
) -> dict[int, dict[str, float]]:
    """Train until the last step or until it is time to stop; return mIoU by kind, by step."""
    words = ["train", recipe, "--ranks", "1"]
    words += [word for setting in settings for word in ("--set", setting)]
    log = Path(run.output_dir) / f"{recipe}.log"
    scored: dict[int, dict[str, float]] = {}
    was_told = False
    with log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_keye", *words], stdout=lines, stderr=subprocess.STDOUT
        )
    seen = 0
    try:
        while True:
            status = process.poll()
            seen += _note_new(run, seen, recipe, progress, kinds, scored)
            if status is not None:
                break
            if progress.seconds > until and not was_told:
                process.send_signal(signal.SIGTERM)
                was_told = True
            if progress.seconds > until + _SAVE_SECONDS:
                process.kill()
            time.sleep(_POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    progress.note(recipe, status=status, was_told_to_stop=was_told)
    if status and not was_told:
        raise UserError(f"{recipe}: ended with status {status}; see {log}")
    return scored


def _note_new(
    run: RunConfig,
    seen: int,
    part: str,
    progress: _Progress,
    kinds: Mapping[str, str],
    scored: dict[int, dict[str, float]],
) -> int:
    """Note what a run's metrics tell behind the lines that were seen; return how many are new."""
    new = list(_whole_lines(run.folder / "metrics.jsonl"))[seen:]
    for line in new:
        step = line["step"]
        if "evaluation" in line:
            scored[step] = _scores(run.folder / "evaluations" / f"step-{step:08}.jsonl", kinds)
            progress.note(part, step=step, mIoU=scored[step])
        elif policy := line.get("policy"):
            teaching = 1 - policy["num_groups_dropped"] / max(1, policy["num_prompts"])
            progress.note(part, step=step, reward=policy["reward_task"], teaching=teaching)
    return len(new)


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that is being written."""
    text = file.read_text() if file.is_file() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _scores(answers: Path, kinds: Mapping[str, str]) -> dict[str, float]:
    """Return the mean score of answers by the kind of their question."""
    by_kind: dict[str, list[float]] = {}
    for text in answers.read_text().splitlines():
        line = json.loads(text)
        by_kind.setdefault(kinds[line["id"]], []).append(line["score"])
    return {kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
