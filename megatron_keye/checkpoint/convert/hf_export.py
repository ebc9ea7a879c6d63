# SPDX-License-Identifier: Apache-2.0
"""An export to the released form: what is checked before, and what completes it.

The files of weights in between may be filled by any processes, in any order.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_keye.checkpoint.adapters import shapes_with_adapters
from megatron_keye.checkpoint.convert.carried_files import (
    CARRIED,
    check_files_from,
    copy_files,
    find_files,
    find_missing,
)
from megatron_keye.checkpoint.convert.check_tensors import check_shapes, check_types
from megatron_keye.checkpoint.convert.fingerprint import fingerprint
from megatron_keye.checkpoint.convert.merged_weights import MergedWeights
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.convert.options import Options
from megatron_keye.checkpoint.convert.to_hf import HfMaker
from megatron_keye.checkpoint.hf.config import CONFIG, read_config
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout
from megatron_keye.checkpoint.hf.write_config import changes_of_config, make_config
from megatron_keye.checkpoint.history import HISTORY, PastRun, read_history, text_of
from megatron_keye.checkpoint.manifest import check_sizes, check_sums
from megatron_keye.checkpoint.saved_run import read_saved_run
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder

_REMEDY = (
    "megatron-keye convert native-to-hf --files-from FOLDER adds them, from the folder of the "
    "released model"
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HfExport:
    """A checked export; can be pickled."""

    maker: HfMaker
    """Fills the files of weights."""
    folder: PartialFolder
    """Where they go."""
    files: dict[str, Path]
    """Location of each small file, by name."""
    config: dict[str, Any]
    """Content of config.json."""
    history: list[PastRun] | None
    """Runs that trained the weights, if the checkpoint knows them."""

    def finish(self) -> None:
        """Add everything but the weights, and give the folder its name."""
        self.maker.finish(self.folder.path, dict.fromkeys(self.maker.file_sizes()))
        copy_files(self.files, self.folder.path)
        (self.folder.path / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        if self.history is not None:
            (self.folder.path / HISTORY).write_text(text_of(self.history))
        self.folder.finish()


def begin_export(
    native: Path,
    out: Path,
    options: Options,
    *,
    layout: ExpertLayout = "fused",
    file_bytes: int = 5_000_000_000,
    files_from: Path | None = None,
    needs_all_files: bool = False,
) -> HfExport:
    """Check a native checkpoint and start the folder of its export.

    What the export lacks for serving, and what of a carried config.json changes, is logged.

    Args:
        native: Folder of a checkpoint, with its run.json.
        out: Folder to make; must not exist.
        options: How to convert; processes and progress are the caller's.
        layout: Expert layout.
        file_bytes: Most bytes of one file, unless one tensor is larger.
        files_from: Folder whose small files are added to those in the checkpoint, or replace
            them; None adds none.
        needs_all_files: Whether an export that lacks what a server needs is refused.

    Raises:
        UserError: When the checkpoint is incomplete or damaged; nothing is written then.
    """
    if options.checks_sums:
        check_sums(native, check_sizes(native), num_threads=options.num_workers)
    source = NativeFolder(native)
    run = read_saved_run(native)
    got = {key: tensor.shape for key, tensor in source.tensors.items()}
    expected = shapes_with_adapters(run, got)
    check_shapes(got, expected, where=str(native), dropped=options.dropped)
    types = {key: tensor.dtype for key, tensor in source.tensors.items()}
    dtype = check_types(types, where=str(native), wanted=options.dtype)
    files = _files(native, files_from)
    config = _make_config(run, dtype, files.pop(CONFIG, None))
    _check_complete(files, config, out, needs_all_files=needs_all_files)
    merged = MergedWeights(source, run.training.lora)
    maker = HfMaker(run.model, layout, merged, dtype, options.checks_finite, file_bytes)
    settings = [run.to_json(), json.dumps(config), layout, str(dtype)]
    settings += [str(options.checks_finite), str(file_bytes)]
    mark = fingerprint(settings, [*source.source_files(), *files.values()])
    return HfExport(maker, PartialFolder(out, mark), files, config, read_history(native))


def _files(native: Path, files_from: Path | None) -> dict[str, Path]:
    if files_from is None:
        return find_files(native / CARRIED)
    check_files_from(files_from)
    return find_files(native / CARRIED, files_from)


def _make_config(run: RunConfig, dtype: torch.dtype, base_file: Path | None) -> dict[str, Any]:
    base = read_config(base_file) if base_file is not None else {}
    if base_file is not None:
        for change in changes_of_config(run.model, base, base_file):
            _logger.warning("config.json: %s", change)
    return make_config(run.model, str(dtype).removeprefix("torch."), base)


def _check_complete(
    files: dict[str, Path], config: dict[str, Any], out: Path, *, needs_all_files: bool
) -> None:
    missing = find_missing(files, config)
    if not missing:
        return
    if needs_all_files:
        raise UserError(
            f"{out}: got none of {', '.join(missing)}, expected all for --require-complete; "
            f"{_REMEDY}"
        )
    lines = "".join(f"\n  {phrase}" for phrase in missing)
    _logger.warning("%s will lack, for serving:%s\n%s", out, lines, _REMEDY)
