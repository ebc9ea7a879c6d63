"""Prepares samples for training: JSON lines of conversations to a zarr store of tokens.

    python tools/prepare_data.py INPUT.jsonl --out STORE --workers 8 --preview 6
    launch/local.sh RECIPE --set data.samples=STORE

Tokens depend on the recipe's frames, tokenizer and picture sizes, and a run with other ones
refuses the store. Killed half-way, the same command continues. Exit status 2 when an argument or,
unless --on-bad-sample skip says otherwise, a sample is wrong; no store is left then.
"""

import argparse
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the tool also runs where the package is not installed

from megatron_keye.config import DataConfig, ModelConfig, RunConfig  # noqa: E402
from megatron_keye.data.store.prepare import BlockMaker, SampleFile, scan  # noqa: E402
from megatron_keye.data.store.probe_cache import ProbeCache  # noqa: E402
from megatron_keye.data.store.settings import deciding_settings  # noqa: E402
from megatron_keye.data.tokens import load_tokenizer  # noqa: E402
from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.files.partial_folder import PartialFolder  # noqa: E402
from megatron_keye.files.workers import make_files  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402

USER_ERROR = 2
INTERRUPTED = 130
MOST_SHOWN = 20
"""Refused samples that the terminal names; the store names all that were skipped."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/prepare_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, metavar="INPUT.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE")
    parser.add_argument(
        "--recipe",
        default="keye_30b_a3b",
        help=f"gives tokenizer and sizes; one of: {', '.join(recipe_names())}",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; default: all cores"
    )
    parser.add_argument(
        "--on-bad-sample",
        choices=("refuse", "skip"),
        default="refuse",
        help="whether a sample that cannot be read stops the whole or is left out and named",
    )
    parser.add_argument(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="draw N samples to STORE.preview.png, their whole text to STORE.preview.txt",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Prepare, and return the exit code."""
    options = parse_arguments(arguments)
    try:
        report = prepare(options)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues\n")
        return INTERRUPTED
    show(options, report)
    return 0


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says and return what it came to."""
    run: RunConfig = load_recipe(options.recipe)(num_ranks=1, has_gpu=True)
    run = run.with_overrides(options.set)
    if options.workers < 1 or options.preview < 0:
        raise UserError("--workers and --preview: expected 1 or more, and 0 or more")
    report = make_store(
        options.input,
        options.out,
        run.data,
        run.model,
        num_workers=options.workers,
        skips_bad=options.on_bad_sample == "skip",
    )
    if options.preview:
        from megatron_keye.data.store.preview import write_preview

        write_preview(options.out, run.data, run.model, options.preview)
    return report | {"row_tokens": run.data.row_tokens}


def make_store(
    samples: Path,
    out: Path,
    config: DataConfig,
    model: ModelConfig,
    *,
    num_workers: int,
    skips_bad: bool,
) -> dict[str, Any]:
    """Make a store, or go on with what a killed attempt left.

    Args:
        samples: JSON lines.
        out: The store; must not exist.
        config: Budgets, tokenizer and loss tokens.
        model: Ids of placeholders, patch and merge size.
        num_workers: Processes.
        skips_bad: Whether samples of no use are left out.

    Returns:
        Totals, seconds, and samples_per_second of what was left to do.

    Raises:
        UserError: For an unreadable file, a store that is there, or, unless they are skipped,
            samples of no use, naming them.
    """
    started = time.perf_counter()
    settings = deciding_settings(load_tokenizer(config.tokenizer), config, model)
    file = scan(samples)
    folder = PartialFolder(out, json.dumps([str(file.path), file.digest, settings]))
    probes = ProbeCache(folder.path / "probes")
    maker = BlockMaker(file=file, config=config, model=model, probes=probes)
    num_made = make_blocks(maker, folder, num_workers)
    if not skips_bad:
        refuse(file, folder)
    attributes = {
        "settings": settings,
        "sample_file": str(file.path),
        "sample_file_digest": file.digest,
        # Seen from the store, so that both can move together.
        "media_base": os.path.relpath(file.path.resolve().parent, out.resolve().parent),
    }
    totals = finish(file, folder, attributes)
    seconds = time.perf_counter() - started
    return totals | {"seconds": seconds, "samples_per_second": num_made / seconds}


def make_blocks(maker: BlockMaker, folder: PartialFolder, num_workers: int) -> int:
    """Make the blocks that an earlier attempt has not, and return how many samples that took."""
    blocks = maker.file.blocks
    done = sum(lines.num_samples for name, lines in blocks.items() if folder.record(name))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("preparing", total=maker.file.num_samples, completed=done)
        make_files(
            maker,
            list(blocks),
            folder,
            num_workers=num_workers,
            advance=lambda count: bar.advance(task, count),
        )
    return maker.file.num_samples - done


def refuse(file: SampleFile, folder: PartialFolder) -> None:
    """Raise a ValueError if any sample was refused; its block will be made again."""
    reasons = []
    for name in file.blocks:
        refused = folder.record(name)["refused"]
        if refused:
            folder.forget(name)
        reasons += refused
    if reasons:
        raise UserError(
            f"{len(reasons)} of {file.num_samples} samples are of no use, so no store was made; "
            "correct them, or leave them out with --on-bad-sample skip (the other samples are "
            f"kept for that):\n{shortened(reasons)}"
        )


def shortened(reasons: list[str]) -> str:
    """Return the first reasons, a line each, and how many more there are."""
    more = len(reasons) - MOST_SHOWN
    lines = [f"  {reason}" for reason in reasons[:MOST_SHOWN]]
    return "\n".join(lines + [f"  ... and {more} more"] * (more > 0))


def finish(file: SampleFile, folder: PartialFolder, attributes: dict[str, Any]) -> dict[str, Any]:
    """Join all blocks, give the store its name and return its totals."""
    from megatron_keye.data.store.writer import write_store

    blocks = {folder.path / name: folder.record(name) for name in file.blocks}
    if not any(record["num_samples"] for record in blocks.values()):
        reasons = [reason for record in blocks.values() for reason in record["refused"]]
        raise UserError(f"{file.path}: has no sample of any use:\n{shortened(reasons)}")
    with Console(stderr=True).status("writing the store"):
        totals = write_store(folder.path / "store", blocks, attributes)
    folder.promote("store")
    return totals


def show(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print what came of it."""
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
            f"some samples are longer than data.row_tokens = {report['row_tokens']:,}, and a run "
            "with such rows will not take them\n"
        )
    if report["num_refused"]:
        reasons = (options.out / "refused.txt").read_text().splitlines()
        sys.stdout.write(f"left out:\n{shortened(reasons)}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
