# SPDX-License-Identifier: Apache-2.0
"""Trains a recipe.

    megatron-keye train keye_tiny
    megatron-keye train keye_tiny --ranks 2 --set training.steps=10
    megatron-keye train my_recipe.py:small --resume auto
    torchrun --nproc-per-node 8 launch/train.py keye_30b_a3b

Starts one process per rank on this machine and stops them together. If RANK is set, by torchrun,
srun or this command itself, the process is that rank. Ctrl-C and the signals TERM, HUP and USR1
let ranks finish their step and save a checkpoint; a second Ctrl-C kills them.

Exit status: 0 done, 75 stopped by USR1 and saved, 130 or 143 stopped by Ctrl-C or TERM, 2 wrong
setting, 4 no progress, else that of the first rank that failed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_keye.cli import local, rank
from megatron_keye.cli.arguments import (
    add_count,
    add_recipe,
    chosen_run,
    make_parser,
    positive_integer,
)
from megatron_keye.cli.shared_heartbeats import shared_heartbeats
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError
from megatron_keye.training.health.bad_step import BadStep


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye train", __doc__)
    add_recipe(parser)
    default = f"variable RANKS, else the number of GPUs, else {local.DEFAULT_CPU_RANKS}"
    add_count(parser, "--ranks", f"processes to start; default: {default}")
    parser.add_argument(
        "--resume",
        metavar="auto|none|FOLDER",
        help="same as --set training.checkpoint.resume=...",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="compute the bad step of this file of a run's bad_steps/ once more, from the "
        "checkpoint that was newest then, or that of --resume, print what comes out and exit",
    )
    parser.add_argument("--show", action="store_true", help="print all settings as JSON and exit")
    parser.add_argument(
        "--check", action="store_true", help="only check that the settings fit --ranks"
    )
    options = parser.parse_args(arguments)
    if options.replay is not None and options.resume is None:
        options.resume = BadStep.read(options.replay).checkpoint or "none"
    if options.resume is not None:
        options.set.append(f"training.checkpoint.resume={options.resume}")
    return options


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Train and return the exit status."""
    options = parse_arguments(arguments)
    if options.check:
        num_ranks = options.ranks or default_ranks()
        rank.make_run(options, num_ranks).check_num_ranks(num_ranks)
        return 0
    if "RANK" in os.environ:
        file = options.replay
        work = partial(rank.recompute, file=file) if file is not None else None
        return rank.run_rank(options, work=work)
    num_ranks = options.ranks or default_ranks()
    if options.show:
        run = chosen_run(options, num_ranks=num_ranks, has_gpu=local.count_gpus() > 0)
        sys.stdout.write(run.to_json())
        return 0
    with shared_heartbeats():
        return local.launch(
            [sys.executable, "-m", "megatron_keye", "train", *arguments], num_ranks
        )


def default_ranks() -> int:
    """Return the number of ranks to start without --ranks.

    Raises:
        UserError: When the variable RANKS is not an integer of 1 or more.
    """
    text = os.environ.get("RANKS", "")
    if text:
        try:
            return positive_integer(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"variable RANKS: {error}") from None
    return local.count_gpus() or local.DEFAULT_CPU_RANKS
