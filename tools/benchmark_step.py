# SPDX-License-Identifier: Apache-2.0
"""Times whole decoder layers of a recipe beside plain Megatron-Core on the same GPUs.

    python -m tools.benchmark_step --all --out step.jsonl --profiles profiles
    python -m tools.benchmark_step --all --ranks 2 --out step.jsonl
    python -m tools.benchmark_step --tokens 131072 --recompute full selective

A step is forward, backward and optimizer of --layers layers at full width, each timed. The peer is
Megatron-Core's own layers with Transformer Engine: dense attention, the same experts, widths,
fused kernels and optimizer, and its usual recomputation ("moe,layernorm" beside selective and
full).
`times_faster` compares forward and backward; `model_tflop_per_s` are the model's FLOPs in both.
--without turns fused kernels off, one at a time or "all". --layouts answers is a prompt with eight
answers behind it, each of 1/40 of the row; it has no peer, and is to be compared with eight rows
of "one" that have 33/40 of its tokens. --profiles writes the kernels of one more step by name; the
share of the step in which the GPU works stands in every line. Every case prints a JSON line; one
that fails or runs out of memory says so, and the next one runs. --all takes about five minutes on
an H100.

--ranks splits rows by context and the experts over so many GPUs, on both sides; lines have rank
0's figures, and the share of its step in which nothing but communication ran
("exposed_communication"). A case that fails then ends the run. --all takes less than three minutes
on two.

Without a GPU a tiny recipe runs, which shows that the cases work and proves nothing of speed.
Several ranks have no peer there: Megatron-Core's own attention does not split rows.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import add_count, add_recipe_option, make_parser, positive_integer
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config.training import RECOMPUTE
from tools.benchmark_step_cases import (
    FUSIONS,
    every_combination,
    one_gpu_table,
    two_gpu_table,
)
from tools.benchmark_step_ranks import joined, rank_and_ranks, start_ranks

PHASES = ("sparse", "dense", "indexer_warmup")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_step", __doc__)
    add_recipe_option(parser, default="")
    add_count(parser, "--layers", "decoder layers", default=2)
    add_count(parser, "--ranks", "GPUs, context N x expert N", default=1)
    parser.add_argument("--all", action="store_true", help="the table of so many GPUs, 1 or 2")
    parser.add_argument("--tokens", type=positive_integer, nargs="+", metavar="N", default=[])
    for name, values, default in (
        ("--phases", PHASES, "sparse"),
        ("--layouts", ("one", "packed", "answers"), "one"),
        ("--localities", ("segments", "tokens"), "segments"),
        ("--recompute", RECOMPUTE, "none"),
        ("--without", ("", "all", *FUSIONS), ""),
    ):
        parser.add_argument(name, nargs="+", choices=values, default=[default])
    add_count(parser, "--repeats", "timed steps of a case, after two others", default=3)
    parser.add_argument("--no-peer", action="store_true", help="time our layers alone")
    parser.add_argument(
        "--plain-rotary", action="store_true", help="the peer rotates without a fused kernel"
    )
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="folder for kernels by name")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Time every case and return the exit status."""
    options = parse_arguments(arguments)
    if options.ranks > 1 and "RANK" not in os.environ:
        return start_ranks(arguments, options.ranks)
    rank, num_ranks = rank_and_ranks()
    # Both before torch is imported.
    complete_environment(os.environ, local_ranks=num_ranks)
    quieten_libraries()
    import torch

    from tools.benchmark_step_measure import measure_all

    has_gpu = torch.cuda.is_available()
    if not has_gpu and rank == 0:
        sys.stderr.write("no GPU: the cases run, and their times prove nothing of speed\n")
    options.recipe = options.recipe or ("keye_30b_a3b" if has_gpu else "keye_tiny")
    cases = one_gpu_table() if num_ranks == 1 else two_gpu_table()
    if not (options.all and has_gpu):
        cases = every_combination(
            options.tokens or [131_072 if has_gpu else 256],
            options.phases,
            options.layouts,
            options.localities,
            options.recompute,
            options.without,
        )
    with joined():
        return measure_all(list(cases), options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
