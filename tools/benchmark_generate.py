# SPDX-License-Identifier: Apache-2.0
"""Times answers of a few full-width layers of a recipe on one GPU, beside training's own forward.

    python -m tools.benchmark_generate --out generate.jsonl
    python -m tools.benchmark_generate --tokens 32768 --layers 2
    python -m tools.benchmark_generate --cases graphs --set training.expert_layers=torch

Weights and prompts are random. A JSON line each for

prefill: the attention of a whole prompt, in one piece and in pieces of rollout.prefill_tokens, as
a share of its time in training's forward of the same row, without the indexer's loss;
decode: a layer with one new token of each answer, as a share of the operator's own time plus that
of a layer whose operator does nothing;
shared_prompt: pages of many answers to one prompt, as a share of those of one answer;
log_probs: how far the log-probabilities of those answers are from training's;
graphs, if named: a token of each answer as a CUDA graph, and launched kernel by kernel.

One that fails or runs out of memory says so, and the next one runs. All take about two minutes on
an H100 with 131,072 tokens. Without a GPU a tiny recipe runs, which shows that the cases work and
proves nothing of speed.
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

CASES = ("prefill", "decode", "answers")
"""Those that run unless others are named."""
_ALL_CASES = (*CASES, "graphs")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_generate", __doc__)
    add_recipe_option(parser, default="")
    add_count(parser, "--layers", "decoder layers", default=4)
    parser.add_argument("--cases", nargs="+", choices=_ALL_CASES, default=list(CASES))
    parser.add_argument(
        "--tokens", type=positive_integer, metavar="N", help="tokens of a prompt; default: 131072"
    )
    parser.add_argument(
        "--batches",
        type=positive_integer,
        nargs="+",
        default=[1, 32],
        help="answers that decode at once; default: 1 32",
    )
    add_count(parser, "--answers", "answers to one prompt", default=16)
    parser.add_argument(
        "--new-tokens",
        type=positive_integer,
        metavar="N",
        help="tokens of each; default: 640, which makes 10,240 log-probabilities",
    )
    add_count(parser, "--repeats", "timed calls, after two others", default=10)
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Time every case and return the exit status."""
    options = parse_arguments(arguments)
    # Both before torch is imported.
    complete_environment(os.environ, local_ranks=1)
    quieten_libraries()
    import torch

    from tools.benchmark_generate_measure import measure_all

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        sys.stderr.write("no GPU: the cases run, and their times prove nothing of speed\n")
    options.recipe = options.recipe or ("keye_30b_a3b" if has_gpu else "keye_tiny")
    options.tokens = options.tokens or (131_072 if has_gpu else 192)
    options.new_tokens = options.new_tokens or (640 if has_gpu else 4)
    return measure_all(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
