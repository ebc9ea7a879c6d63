# SPDX-License-Identifier: Apache-2.0
"""Cuts captioned videos into pieces with the captions between, as samples for training.

    megatron-keye interleave CAPTIONS.jsonl --out SAMPLES.jsonl
    megatron-keye prepare SAMPLES.jsonl --out STORE --recipe keye_stage1

A line of CAPTIONS.jsonl is {"video": FILE, "captions": [{"start": 0, "end": 12.5, "caption":
"..."}, ...]}, with times in seconds. Each stretch is shown as the fewest equal pieces of at most
--piece-seconds, which a training stage may limit (data.frames.max_seconds), and its caption
follows. Time without a caption is left out. A video with more than --sample-seconds becomes
several samples: a row of 32K tokens holds a minute at 2 frames of 256 tokens per second.

Exit status 2, and no samples, for a wrong argument or a malformed line.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import report_error, reports_user_errors
from megatron_keye.data.interleave import interleave_file


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye interleave", __doc__)
    parser.add_argument("captions", type=Path, metavar="CAPTIONS.jsonl", help="captioned videos")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="SAMPLES.jsonl", help="must not exist"
    )
    for name, default, meaning in (
        ("--piece-seconds", 15.0, "longest piece"),
        ("--sample-seconds", 60.0, "most video of a sample, unless one caption has more"),
    ):
        parser.add_argument(
            name,
            type=_seconds,
            default=default,
            metavar="S",
            help=f"{meaning}; default: {default:g}",
        )
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Write the samples and return the exit status."""
    options = parse_arguments(arguments)
    try:
        counts = interleave_file(
            options.captions,
            options.out,
            piece_seconds=options.piece_seconds,
            sample_seconds=options.sample_seconds,
        )
    except OSError as error:
        return report_error(error)
    sys.stdout.write(
        f"{options.out}: {counts.num_samples:,} samples of {counts.num_videos:,} videos, "
        f"{counts.num_captions:,} captions after {counts.num_pieces:,} pieces, at most "
        f"{counts.longest_seconds:,.1f} s of video in a sample\n"
    )
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return seconds
