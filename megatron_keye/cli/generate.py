# SPDX-License-Identifier: Apache-2.0
"""Answers questions with a trained model: those of a file, or in a chat on the terminal.

    megatron-keye generate keye_tiny --weights runs/keye_tiny
    megatron-keye generate keye_tiny --weights runs/keye_tiny --greedy --samples QUESTIONS.jsonl
    megatron-keye generate runs/mine/run.json --weights runs/mine --ranks 8
    megatron-keye generate keye_30b_a3b --weights DIR --samples Q.jsonl --out A.jsonl --answers 4

Samples have the forms of training; the last turn of the assistant, if there is one, is left out
and comes back as "expected". Each answer is a line of JSON: name, answer, text, finish,
num_tokens, log_prob, expected. Without --samples, lines that are typed are answered as they come;
/help lists what a chat knows, among it how to show a video or an image.

The recipe says how the model was trained: a recipe's name with the settings of that run, or its
run.json. Weights come from any grid; --ranks may be any number that the grid of generation allows
(rollout.tensor, rollout.expert). Tokens are drawn as the settings of rollout say. With
--set rollout.server=URL an SGLang server answers instead, and no weights are needed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_keye.cli import local, rank
from megatron_keye.cli.arguments import add_count, add_folder, add_recipe, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config.run import RunConfig

if TYPE_CHECKING:
    from megatron_keye.parallel.process import Process


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye generate", __doc__)
    add_recipe(parser)
    add_folder(parser, "--weights", "checkpoint, or the folder of a run")
    add = parser.add_argument
    add("--samples", metavar="FILE", help="questions; default: a chat on the terminal")
    add("--out", metavar="FILE", help="file for the answers; default: standard output")
    add("--greedy", action="store_true", help="same as --set rollout.temperature=0")
    add_count(parser, "--answers", "answers to each question", default=1)
    add_count(parser, "--ranks", "processes to start; default: the number of GPUs, else 1")
    add("--show", action="store_true", help="print all settings as JSON and exit")
    options = parser.parse_args(arguments)
    if options.samples is None and (options.out or options.answers > 1):
        parser.error("--out and --answers need --samples")
    if options.greedy:
        options.set.append("rollout.temperature=0")
    return options


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Generate and return the exit status."""
    options = parse_arguments(arguments)
    if "RANK" in os.environ:
        return rank.run_rank(options, prepare=_make_run, work=partial(_generate, options))
    num_ranks = options.ranks or local.count_gpus() or 1
    command = [sys.executable, "-m", "megatron_keye", "generate", *arguments]
    return local.launch(command, num_ranks, shares_stdin=options.samples is None)


# Both import late: torch takes seconds, and a rank's environment comes before it.
def _make_run(options: argparse.Namespace, num_ranks: int) -> RunConfig:
    from megatron_keye.cli.generation import make_run

    return make_run(options, num_ranks)


def _generate(options: argparse.Namespace, run: RunConfig, process: "Process") -> bool:
    from megatron_keye.cli.generation import generate

    return generate(run, process, options)
