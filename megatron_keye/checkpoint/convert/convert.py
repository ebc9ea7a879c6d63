# SPDX-License-Identifier: Apache-2.0
"""Converts released checkpoints to native ones and back, tensor by tensor.

A process holds at most three times the largest tensor that is converted at once (the embedding;
one expert of fused ones), and 600 MB for Python, torch and metadata, whatever the model's size.
All names, shapes and types are checked from headers before anything is written.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_keye.checkpoint.convert.carried_files import CARRIED, copy_files, find_files
from megatron_keye.checkpoint.convert.check_tensors import check_shapes, check_types
from megatron_keye.checkpoint.convert.fingerprint import fingerprint
from megatron_keye.checkpoint.convert.hf_export import begin_export
from megatron_keye.checkpoint.convert.options import Options as Options
from megatron_keye.checkpoint.convert.sources import MixedSource
from megatron_keye.checkpoint.convert.to_hf import HfMaker
from megatron_keye.checkpoint.convert.to_native import NativeMaker
from megatron_keye.checkpoint.hf.config import CONFIG, check_config
from megatron_keye.checkpoint.hf.folder import open_unquantised
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, layout_of, parameter_shapes
from megatron_keye.checkpoint.history import HISTORY, read_history, released, text_of
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.saved_run import RUN
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.workers import Advance, make_files


def hf_to_native(hf: Path, out: Path, run: RunConfig, options: Options) -> None:
    """Make a native checkpoint from a released one, for any grid.

    Args:
        hf: Folder of safetensors.
        out: Folder to make; must not exist.
        run: Its model must be the checkpoint's.
        options: How to convert.

    Raises:
        UserError: When the checkpoint does not fit or is damaged; nothing is left then.
    """
    entries = open_unquantised(hf)
    check_config(hf / CONFIG, run.model)
    layout = layout_of(entries)
    expected = parameter_shapes(run.model, layout)
    got = {name: entry.shape for name, entry in entries.items()}
    check_shapes(got, expected, where=str(hf), dropped=options.dropped)
    origins = {name: entries[name] for name in expected}
    types = {name: entry.dtype for name, entry in origins.items()}
    dtype = check_types(types, where=str(hf), wanted=options.dtype)
    maker = NativeMaker(run.model, layout, MixedSource(origins), dtype, options.checks_finite)
    sources = sorted({entry.file for entry in origins.values()})
    history = read_history(hf)
    notes = {HISTORY: text_of([released(hf.resolve().name)] if history is None else history)}
    write_native(maker, out, run, sources, options, carried_from=[hf], notes=notes)


def write_native(
    maker: NativeMaker,
    out: Path,
    run: RunConfig,
    sources: Iterable[Path],
    options: Options,
    *,
    carried_from: Iterable[Path],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a native checkpoint with the tensors of a maker.

    Args:
        maker: Gives the tensors.
        out: Folder to make.
        run: Saved in the checkpoint as JSON.
        sources: Files that decide the content.
        options: How to convert.
        carried_from: Folders whose small files are copied too; the last one's count.
        notes: Further text files of the checkpoint, by name.
    """
    files = find_files(*carried_from)
    settings = [run.to_json(), maker.layout, str(maker.dtype), str(maker.checks_finite)]
    folder = PartialFolder(out, fingerprint(settings, [*sources, *files.values()]))
    with folder.filling():
        _fill(maker, folder, options)
        records = {name: folder.record(name) for name in maker.file_sizes()}
        maker.finish(folder.path, records)
        (folder.path / CARRIED).mkdir(exist_ok=True)
        copy_files(files, folder.path / CARRIED)
        for name, text in {**(notes or {}), RUN: run.to_json()}.items():
            (folder.path / name).write_text(text)
        sums = {name: folder.sum(name) for name in records}
        folder.finish(lambda: write_manifest(folder.path, sums))


def native_to_hf(
    native: Path,
    out: Path,
    options: Options,
    *,
    layout: ExpertLayout = "fused",
    file_bytes: int = 5_000_000_000,
    files_from: Path | None = None,
    needs_all_files: bool = False,
) -> None:
    """Make a released checkpoint from a native one, saved on any grid, its adapters merged.

    Args:
        native: Folder of a checkpoint, with its run.json.
        out: Folder to make; must not exist.
        options: How to convert.
        layout: Expert layout.
        file_bytes: Most bytes of one file, unless one tensor is larger.
        files_from: Folder whose small files are added to those in the checkpoint, or replace
            them; None adds none.
        needs_all_files: Whether to refuse an export that lacks what a server needs, instead of
            logging it.

    Raises:
        UserError: When the checkpoint is incomplete or damaged; nothing is left then.
    """
    export = begin_export(
        native,
        out,
        options,
        layout=layout,
        file_bytes=file_bytes,
        files_from=files_from,
        needs_all_files=needs_all_files,
    )
    with export.folder.filling():
        _fill(export.maker, export.folder, options)
        export.finish()


def _fill(maker: NativeMaker | HfMaker, folder: PartialFolder, options: Options) -> None:
    sizes = maker.file_sizes()
    finished = {name for name in sizes if folder.record(name) is not None}
    options.progress.begin(sum(size for name, size in sizes.items() if name not in finished))
    advance: Advance = options.progress.advance
    try:
        make_files(maker, list(sizes), folder, num_workers=options.num_workers, advance=advance)
    except UserError:
        # With wrong data, resuming would fail again; after a kill it helps.
        folder.discard()
        raise
