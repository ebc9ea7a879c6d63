# SPDX-License-Identifier: Apache-2.0
"""Prepares samples for training: tokenizes conversations into a zarr store.

    megatron-keye prepare INPUT --out STORE --workers 8 --preview 6
    megatron-keye train RECIPE --set data.samples=STORE

The tokens depend on the recipe's tokenizer, frame rate and image sizes; a run with other
settings refuses the store. A killed preparation continues when the same command is run again.
Exit status 2, and no store, for a wrong argument or, without --on-bad-sample skip, a bad sample.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_keye.cli.arguments import (
    add_recipe_option,
    add_workers,
    chosen_run,
    chosen_workers,
    make_parser,
)
from megatron_keye.cli.progress import sample_bar
from megatron_keye.cli.status import INTERRUPTED, report_error, reports_user_errors
from megatron_keye.errors import UserError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye prepare", __doc__)
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help="JSON lines, a JSON list, or parquet"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="STORE", help="store to write; must not exist"
    )
    add_recipe_option(parser, default="keye_30b_a3b")
    add_workers(parser)
    parser.add_argument(
        "--on-bad-sample",
        choices=("refuse", "skip"),
        default="refuse",
        help="refuse: write no store if a sample cannot be read; skip: leave it out and name it; "
        "default: refuse",
    )
    parser.add_argument(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="write N samples to STORE.preview.png (images) and STORE.preview.txt (text), with "
        "what is predicted and its weight",
    )
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Make the store and return the exit status."""
    options = parse_arguments(arguments)
    try:
        report = prepare(options)
    except OSError as error:
        return report_error(error)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to continue\n")
        return INTERRUPTED
    show(options, report)
    return 0


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make the store that the command line describes and return its totals."""
    run = chosen_run(options, num_ranks=1, has_gpu=True)
    num_workers = chosen_workers(options)
    if options.preview < 0:
        raise UserError(f"--preview: got {options.preview}, expected 0 or more")
    # Late, since zarr and the video readers take a second to import.
    from megatron_keye.data.store.make import make_store

    with sample_bar("preparing") as progress:
        report = make_store(
            options.input,
            options.out,
            run.data,
            run.model,
            num_workers=num_workers,
            skips_bad=options.on_bad_sample == "skip",
            progress=progress,
        )
    if options.preview:
        from megatron_keye.data.store.preview import write_preview

        write_preview(options.out, run.data, run.model, options.preview)
    return report | {"row_tokens": run.data.row_tokens}


def show(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the totals."""
    from megatron_keye.data.conversation import describe_unread
    from megatron_keye.data.store.make import shortened

    table = Table(title=str(options.out), show_header=False)
    table.add_row("samples", f"{report['num_samples']:,}")
    table.add_row("tokens", f"{report['num_tokens']:,}")
    table.add_row("longest sample", f"{report['longest']:,} tokens")
    table.add_row("images and frames", f"{report['num_pictures']:,}")
    table.add_row("media files", f"{report['num_media']:,}")
    hours = timedelta(seconds=round(report["video_seconds"]))
    table.add_row("video (h:mm:ss)", str(hours))
    table.add_row("left out", f"{report['num_refused']:,}")
    table.add_row("time", f"{report['seconds']:,.1f} s")
    table.add_row("rate", f"{report['samples_per_second']:,.0f} samples/s")
    Console().print(table)
    if report["longest"] > report["row_tokens"]:
        sys.stdout.write(
            f"some samples are longer than data.row_tokens = {report['row_tokens']:,}; a run "
            "needs longer rows, or data.on_bad_sample=skip\n"
        )
    if report["unread"]:
        sys.stdout.write(f"{describe_unread(report['unread'])}\n")
    if report["num_refused"]:
        reasons = (options.out / "refused.txt").read_text().splitlines()
        sys.stdout.write(f"left out:\n{shortened(reasons)}\n")
