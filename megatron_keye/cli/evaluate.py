# SPDX-License-Identifier: Apache-2.0
"""Scores a model's answers to questions about videos, in all and by the length of the video.

    megatron-keye evaluate keye_tiny_grounding --task grounding \\
        --samples runs/grounding/held_out.questions.jsonl --weights runs/keye_tiny_grounding
    megatron-keye generate RECIPE --weights DIR --samples Q.jsonl --out A.jsonl
    megatron-keye evaluate RECIPE --task choice --samples Q.jsonl --answers A.jsonl --out SCORES

Questions are those of the task in a local file, JSON lines, a JSON list or parquet (needs the
extra parquet): of this project (a conversation with "task" and "truth", as megatron-keye
forge_video writes), Video-MME, LongVideoBench, MLVU, MVBench, TempCompass (multiple choice),
NExT-QA, NExT-GQA (also .csv), QVHighlights, Charades-STA (also .txt) or ActivityNet Captions.

grounding: mIoU and the share of answers that overlap by 0.3, 0.5 and 0.7. choice and count:
accuracy. caption: token F1, which counts common words and sees neither order nor meaning. Answers
that are missing or cannot be understood score 0, and are counted. "blind" is the first figure for
answers that look at nothing: the whole video, or a letter that is drawn.

Prints a table. --out DIR gets scores.json, scores.svg and answers.scored.jsonl, each answer as it
was understood; with --weights, which generates first (greedily, unless --set gives another
rollout.temperature), also questions.jsonl and answers.jsonl.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_keye.cli import main as program
from megatron_keye.cli.arguments import (
    add_count,
    add_folder,
    add_json,
    add_recipe,
    chosen_run,
    make_parser,
)
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.observe.bars import Group, draw
from megatron_keye.scoring.answers import read_answers
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.question_file import read_questions, with_media_from, written
from megatron_keye.scoring.summary import (
    LENGTH_BOUNDS,
    ScoredQuestion,
    Summary,
    score_questions,
    summarize,
)
from megatron_keye.scoring.tasks import TRUTHS


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye evaluate", __doc__)
    add_recipe(parser)
    parser.add_argument("--task", choices=TRUTHS, required=True, help="kind of questions")
    parser.add_argument(
        "--samples", type=Path, required=True, metavar="FILE", help="questions with their truth"
    )
    add_folder(parser, "--videos", "folder of a benchmark's videos; default: that of its file")
    answers = parser.add_mutually_exclusive_group(required=True)
    answers.add_argument("--answers", type=Path, metavar="FILE", help="answers to --samples")
    answers.add_argument(
        "--weights", type=Path, metavar="DIR", help="checkpoint that answers; needs --out"
    )
    add_folder(parser, "--out", "folder for scores, made if it does not exist")
    parser.add_argument(
        "--lengths",
        type=float,
        nargs="+",
        default=LENGTH_BOUNDS,
        metavar="SECONDS",
        help="bounds between classes of lengths; default: "
        + " ".join(f"{bound:g}" for bound in LENGTH_BOUNDS),
    )
    add_count(parser, "--ranks", "processes that generate; default: that of generate")
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.weights is not None and options.out is None:
        parser.error("--weights needs --out, a folder for the answers")
    if not all(
        low < high for low, high in zip([0, *options.lengths], options.lengths, strict=False)
    ):
        parser.error(f"--lengths: got {options.lengths}, expected ascending seconds above 0")
    return options


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Score the answers and return the exit status."""
    options = parse_arguments(arguments)
    run = chosen_run(options, num_ranks=options.ranks or 1, has_gpu=False)
    questions = read_questions(options.samples, options.videos)
    asked = [question for question in questions if question.task == options.task]
    if not asked:
        tasks = Counter(question.task for question in questions)
        raise UserError(
            f"--task: got {options.task!r}, expected a task of {options.samples}, which has "
            + ", ".join(f"{count} {task}" for task, count in tasks.items())
        )
    samples, answers = options.samples, options.answers
    if options.weights is not None:
        samples, answers = options.out / "questions.jsonl", options.out / "answers.jsonl"
        questions = asked = _write_questions(samples, asked, options.samples.parent)
        if status := _generate(options, samples, answers):
            return status
    scored = score_questions(asked, read_answers(answers, samples, questions))
    summaries = summarize(scored, options.lengths)
    if options.out is not None:
        _write(options.out, scored, summaries, f"{run.name}: {options.task}")
    if options.json:
        sys.stdout.write(json.dumps([asdict(summary) for summary in summaries], indent=2) + "\n")
    else:
        sys.stdout.write(describe(summaries))
    return 0


def _write_questions(file: Path, asked: Sequence[Question], base: Path) -> list[Question]:
    """Write the questions for a model to read, and return them with their lines."""
    moved = [
        replace(with_media_from(question, base, file.parent), line=line)
        for line, question in enumerate(asked, start=1)
    ]
    with writing(file.parent, "questions"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(written(moved))
    return moved


def _generate(options: argparse.Namespace, samples: Path, answers: Path) -> int:
    """Let the model answer, greedily unless the settings say otherwise, and return the status."""
    wanted = ["rollout.temperature=0", *options.set]
    settings = [word for setting in wanted for word in ("--set", setting)]
    ranks = ["--ranks", str(options.ranks)] if options.ranks else []
    words = ["generate", options.recipe, "--weights", str(options.weights)]
    words += ["--samples", str(samples), "--out", str(answers), *ranks, *settings]
    return program.main(words)


def _write(
    folder: Path, scored: Sequence[ScoredQuestion], summaries: Sequence[Summary], title: str
) -> None:
    """Write the scores as JSON and as a picture, and each answer with its score."""
    lines = [json.dumps(line) + "\n" for each in scored for line in each.written()]
    groups = [
        Group(name=f"{summary.length} ({summary.num_questions:,})", values=summary.metrics)
        for summary in summaries
    ]
    with writing(folder, "scores"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "answers.scored.jsonl").write_text("".join(lines))
        (folder / "scores.svg").write_text(draw(groups, title))
        scores = json.dumps([asdict(summary) for summary in summaries], indent=2)
        (folder / "scores.json").write_text(scores + "\n")


def describe(summaries: Sequence[Summary]) -> str:
    """Return a line of text for all questions and one for each class of lengths."""
    names = list(summaries[0].metrics)
    headings = (*names, "blind", "questions", "answers", "unanswered", "not understood", "cut")
    rows = [("length", headings)]
    for summary in summaries:
        counts = (
            *(summary.num_questions, summary.num_answers, summary.num_unanswered),
            *(summary.num_not_understood, summary.num_cut),
        )
        values = (*(summary.metrics[name] for name in names), summary.blind)
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        rows.append((summary.length, (*shown, *(f"{count:,}" for count in counts))))
    first = max(len(label) for label, _ in rows)
    widths = [2 + max(8, len(heading)) for heading in headings]
    return "".join(
        f"{label:<{first}}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        + "\n"
        for label, cells in rows
    )
