# SPDX-License-Identifier: Apache-2.0
"""Forges clips whose events are known, with questions and right answers: data without a download.

    megatron-keye forge_video runs/forged --samples 200 --seed 0
    megatron-keye forge_video runs/plain --samples 50 --size 56 56 --questions when never --plain

Coloured shapes come, go, blink, move and change colour; words are shown. OUT gets the clips, and
for each part, train and held_out, PART.jsonl with a conversation about each clip, to train on, and
PART.questions.jsonl with one question a line, its "task" and its "truth" (megatron-keye evaluate).
Times are read back from the files. No scene is in both parts; one seed gives the same files.

Kinds of questions: when, never (what is not there), moves, turns (to another colour) and word ask
for times; blinks asks how often; first, together, order and letter are multiple choice; describe
asks for a caption, and at for what is on the screen at some times.

Exit status 2, and nothing written, for a wrong argument; a killed run continues with the same
command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import add_count, add_workers, chosen_workers, make_parser
from megatron_keye.cli.progress import sample_bar
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.production.forged.forge import forge
from megatron_keye.production.forged.options import MOST_SECONDS, ForgeOptions
from megatron_keye.production.forged.questions import KINDS
from megatron_keye.production.forged.scene import BLINK_SHARE


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye forge_video", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_count(parser, "--samples", "clips to train on", default=200)
    add_count(parser, "--held-out", "clips of the held-out part", default=64)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    add_count(parser, "--per-clip", "most questions about a clip", default=4)
    parser.add_argument(
        "--questions",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        metavar="KIND",
        help=f"of {', '.join(KINDS)}; default: all",
    )
    parser.add_argument(
        "--unanswered",
        nargs="+",
        choices=KINDS,
        default=[],
        metavar="KIND",
        help="those of --questions that PART.jsonl leaves out, to be learned from rewards alone",
    )
    for name, kind, shown, default, meaning in (
        ("--size", int, ("WIDTH", "HEIGHT"), (320, 240), "pixels"),
        ("--seconds", float, ("LOW", "HIGH"), (10.0, 30.0), "shortest and longest clip"),
    ):
        parser.add_argument(
            name,
            type=kind,
            nargs=2,
            metavar=shown,
            default=default,
            help=f"{meaning}; default: {default[0]:g} {default[1]:g}",
        )
    parser.add_argument("--rate", type=float, default=4.0, help="frames per second; default: 4")
    add_count(parser, "--shapes", "most shapes of a clip", default=4)
    parser.add_argument(
        "--stay",
        type=float,
        default=MOST_SECONDS,
        metavar="SECONDS",
        help="most seconds for which a shape or a word stays at once; default: no limit",
    )
    for name, share, meaning in (
        ("--words", 0.5, "share of clips that show a word"),
        ("--blinking", BLINK_SHARE, "share of shapes that vanish and come back"),
        ("--variable", 0.25, "share of clips with uneven times between frames"),
    ):
        parser.add_argument(
            name, type=float, default=share, metavar="SHARE", help=f"{meaning}; default: {share:g}"
        )
    parser.add_argument("--plain", action="store_true", help="neither noise nor swaying pictures")
    parser.add_argument(
        "--tokenizer",
        action="store_true",
        help="write OUT/tokenizer, of whole words, for models with a small vocabulary",
    )
    add_workers(parser)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Forge the clips and return the exit status."""
    options = parse_arguments(arguments)
    forged = ForgeOptions(
        num_clips=options.samples,
        num_held_out=options.held_out,
        seed=options.seed,
        kinds=tuple(dict.fromkeys(options.questions)),
        unanswered=tuple(dict.fromkeys(options.unanswered)),
        width=options.size[0],
        height=options.size[1],
        shortest_seconds=options.seconds[0],
        longest_seconds=options.seconds[1],
        frames_per_second=options.rate,
        most_shapes=options.shapes,
        longest_stay=options.stay,
        word_share=options.words,
        blink_share=options.blinking,
        questions_per_clip=options.per_clip,
        variable_share=options.variable,
        has_distractors=not options.plain,
        writes_tokenizer=options.tokenizer,
    )
    with sample_bar("forging") as progress:
        counts = forge(options.out, forged, num_workers=chosen_workers(options), progress=progress)
    for part, count in counts.items():
        unasked = f", {count.num_unasked:,} without a question of these kinds"
        sys.stdout.write(
            f"{options.out / part}.questions.jsonl: {count.num_questions:,} questions about "
            f"{count.num_clips:,} clips{unasked if count.num_unasked else ''}\n"
        )
    return 0
