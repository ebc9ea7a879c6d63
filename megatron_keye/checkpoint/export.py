# SPDX-License-Identifier: Apache-2.0
"""Exports checkpoints to Hugging Face folders while a run goes on.

A run takes the small files that came with its weights into its own folder, from which each
checkpoint gets them. The ranks share an export's files of weights, each reading what it needs from
the checkpoint's folder and holding a few tensors at a time. An export that fails is logged and
leaves nothing, and the run goes on.
"""

import logging
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_keye.checkpoint.convert.carried_files import carry_on
from megatron_keye.checkpoint.convert.hf_export import HfExport, begin_export
from megatron_keye.checkpoint.convert.options import Options
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.progress import NoProgress
from megatron_keye.files.workers import make_files

_logger = logging.getLogger(__name__)


def take_carried_files(run: RunConfig, continued: Path | None) -> None:
    """Copy the small files of the checkpoint that a run starts from into the run's folder.

    For one rank, after an earlier run of this name was set aside and before the first save.

    Args:
        run: The run; its files stay as they are if the checkpoint has none.
        continued: The checkpoint that it continues, if any.
    """
    weights = run.training.checkpoint.weights
    origin = continued or (Path(weights) if weights else None)
    if origin is not None:
        carry_on(origin, run.folder)


def export_checkpoint(run: RunConfig, checkpoint: Path) -> None:
    """Write exports/step-N in the run's folder. Collective: all ranks must call it.

    Args:
        run: The run.
        checkpoint: Folder of its finished checkpoint, which all ranks can read.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    export, failure = _attempt(lambda: _begin(run, checkpoint)) if rank == 0 else (None, "")
    begun = [export]
    dist.broadcast_object_list(begun)
    export = begun[0]
    if export is not None:
        _, failure = _attempt(lambda: _fill_share(export, rank, num_ranks))
    failures = [""] * num_ranks
    dist.all_gather_object(failures, failure)
    if rank != 0:
        return
    failure = next(filter(None, failures), "")
    if export is not None and not failure:
        _, failure = _attempt(lambda: _finish(export, run))
    if export is not None and failure:
        export.folder.discard()
    if failure:
        _logger.warning(
            "%s was not exported: %s; the run goes on, and megatron-keye convert native-to-hf "
            "exports a checkpoint later",
            checkpoint,
            failure,
        )


def _begin(run: RunConfig, checkpoint: Path) -> HfExport:
    out = run.folder / "exports" / checkpoint.name
    # What a killed run left, or a run made that was resumed from an earlier step.
    for left in (*out.parent.glob("*.partial"), out):
        shutil.rmtree(left, ignore_errors=True)
    return begin_export(checkpoint, out, Options(checks_sums=False))


def _fill_share(export: HfExport, rank: int, num_ranks: int) -> None:
    names = list(export.maker.file_sizes())[rank::num_ranks]
    make_files(export.maker, names, export.folder, num_workers=1, advance=NoProgress().advance)


def _finish(export: HfExport, run: RunConfig) -> None:
    with export.folder.filling():
        export.finish()
    keep = run.training.checkpoint.keep_exports
    done = sorted(path for path in export.folder.folder.parent.glob("step-*") if path.is_dir())
    for old in done[:-keep] if keep else []:
        shutil.rmtree(old)


def _attempt[Result](work: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return the result of some work, and what made it fail, for which other ranks wait."""
    try:
        return work(), ""
    except (UserError, OSError) as error:
        return None, str(error)
    except Exception:
        return None, traceback.format_exc()
