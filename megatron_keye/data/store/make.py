# SPDX-License-Identifier: Apache-2.0
"""Makes a store of prepared samples: all blocks, by several processes, joined when all are there.

Killed half-way, the same call continues.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.records.file import SampleFile, scan
from megatron_keye.data.store.prepare import BlockMaker
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.store.writer import write_store
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.probe_cache import ProbeCache
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.progress import NoProgress, Progress
from megatron_keye.files.workers import make_files

_MAX_SHOWN = 20
"""Refused samples that an error names; the store names all that were skipped."""


def make_store(
    samples: Path,
    out: Path,
    config: DataConfig,
    model: ModelConfig,
    *,
    num_workers: int,
    skips_bad: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a store, or go on with what a killed attempt left.

    Args:
        samples: JSON lines, one JSON list, or parquet.
        out: The store; must not exist.
        config: Budgets, tokenizer and loss tokens.
        model: Ids of placeholders, patch and merge size.
        num_workers: Processes.
        skips_bad: Whether samples that cannot be used are left out.
        progress: Receives the samples that are done.

    Returns:
        Totals, seconds, and samples_per_second of what was left to do.

    Raises:
        UserError: For an unreadable file, a store that is there, or, unless they are skipped,
            samples that cannot be used, naming them.
        DiskError: When the disk does not take the store; nothing is left then.
    """
    started = time.perf_counter()
    settings = deciding_settings(load_tokenizer(config.tokenizer), config, model)
    file = scan(samples)
    folder = PartialFolder(out, json.dumps([str(file.path), file.digest, settings]))
    with folder.filling():
        probes = ProbeCache(folder.path / "probes")
        maker = BlockMaker(file=file, config=config, model=model, probes=probes)
        num_made = _make_blocks(maker, folder, num_workers, progress or NoProgress())
        if not skips_bad:
            _refuse(file, folder)
        attributes = {
            "settings": settings,
            "sample_file": str(file.path),
            "sample_file_digest": file.digest,
            # Seen from the store, so that both can move together.
            "media_base": os.path.relpath(file.path.resolve().parent, out.resolve().parent),
        }
        totals = _finish(file, folder, attributes)
    seconds = time.perf_counter() - started
    return totals | {"seconds": seconds, "samples_per_second": num_made / seconds}


def _make_blocks(
    maker: BlockMaker, folder: PartialFolder, num_workers: int, progress: Progress
) -> int:
    """Make the blocks that an earlier attempt has not, and return how many samples that took."""
    blocks = maker.file.blocks
    done = sum(lines.num_samples for name, lines in blocks.items() if folder.record(name))
    progress.begin(maker.file.num_samples, done)
    make_files(maker, list(blocks), folder, num_workers=num_workers, advance=progress.advance)
    return maker.file.num_samples - done


def _refuse(file: SampleFile, folder: PartialFolder) -> None:
    """Raise a UserError if any sample was refused; its block will be made again."""
    reasons = []
    for name in file.blocks:
        refused = folder.record(name)["refused"]
        if refused:
            folder.forget(name)
        reasons += refused
    if reasons:
        raise UserError(
            f"{len(reasons)} of {file.num_samples} samples are unusable, so no store was made; "
            "correct them, or leave them out with --on-bad-sample skip (the other samples are "
            f"kept for that):\n{shortened(reasons)}"
        )


def shortened(reasons: list[str]) -> str:
    """Return the first reasons, a line each, and how many more there are."""
    more = len(reasons) - _MAX_SHOWN
    lines = [f"  {reason}" for reason in reasons[:_MAX_SHOWN]]
    return "\n".join(lines + [f"  ... and {more} more"] * (more > 0))


def _finish(file: SampleFile, folder: PartialFolder, attributes: dict[str, Any]) -> dict[str, Any]:
    """Join all blocks, give the store its name and return its totals."""
    blocks = {folder.path / name: folder.record(name) for name in file.blocks}
    if not any(record["num_samples"] for record in blocks.values()):
        reasons = [reason for record in blocks.values() for reason in record["refused"]]
        raise UserError(f"{file.path}: has no usable sample:\n{shortened(reasons)}")
    totals = write_store(folder.path / "store", blocks, attributes)
    folder.promote("store")
    return totals
