"""Converts released checkpoints to native ones and back, tensor by tensor.

A process holds at most three times the largest tensor that is converted at once (the embedding;
one expert of fused ones), and 600 MB for Python, torch and metadata, whatever the model's size.
All names, shapes and types are checked from headers before anything is written.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_keye.checkpoint.convert.check_tensors import check_shapes, check_types
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.convert.sources import MixedSource
from megatron_keye.checkpoint.convert.to_hf import HfMaker
from megatron_keye.checkpoint.convert.to_native import NativeMaker, native_shapes
from megatron_keye.checkpoint.hf.config import CONFIG, check_config, make_config, read_config
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, layout_of, parameter_shapes
from megatron_keye.checkpoint.hf.safetensors_index import INDEX, open_folder
from megatron_keye.checkpoint.history import HISTORY, read_history, released, text_of
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.progress import NoProgress, Progress
from megatron_keye.files.workers import Advance, make_files

CARRIED = "hf"
"""Folder in a native checkpoint for tokenizer, processor and config files."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert, for every direction."""

    num_workers: int = 1
    """Processes."""
    dtype: torch.dtype | None = None
    """Type to round to; None keeps the checkpoint's."""
    checks_finite: bool = False
    """Whether NaN and Inf are refused."""
    dropped: tuple[str, ...] = ()
    """Patterns of surplus tensors to ignore."""
    progress: Progress = field(default_factory=NoProgress)
    """Receives the progress."""


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
    entries = open_folder(hf)
    if (hf / CONFIG).is_file():
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
    write_native(maker, out, run, sources, options, carried_from=hf, notes=notes)


def write_native(
    maker: NativeMaker,
    out: Path,
    run: RunConfig,
    sources: Iterable[Path],
    options: Options,
    *,
    carried_from: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a native checkpoint with the tensors of a maker.

    Args:
        maker: Gives the tensors.
        out: Folder to make.
        run: Saved in the checkpoint as JSON.
        sources: Files that decide the content.
        options: How to convert.
        carried_from: Folder whose small files are copied too.
        notes: Further text files of the checkpoint, by name.
    """
    settings = [run.to_json(), maker.layout, str(maker.dtype), str(maker.checks_finite)]
    folder = PartialFolder(out, _fingerprint(settings, sources))
    _fill(maker, folder, options)
    (folder.path / CARRIED).mkdir(exist_ok=True)
    _carry(carried_from, folder.path / CARRIED)
    for name, text in {**(notes or {}), "run.json": run.to_json()}.items():
        (folder.path / name).write_text(text)
    folder.finish()


def native_to_hf(
    native: Path,
    out: Path,
    options: Options,
    *,
    layout: ExpertLayout = "fused",
    file_bytes: int = 5_000_000_000,
    carried_from: Path | None = None,
) -> None:
    """Make a released checkpoint from a native one, saved on any grid.

    Args:
        native: Folder of a checkpoint, with its run.json.
        out: Folder to make; must not exist.
        options: How to convert.
        layout: Expert layout.
        file_bytes: Most bytes of one file, unless one tensor is larger.
        carried_from: Folder with tokenizer, processor and config files; None takes those in
            the checkpoint.

    Raises:
        UserError: When the checkpoint is incomplete or damaged; nothing is left then.
    """
    if not (native / "run.json").is_file():
        raise UserError(
            f"{native}: got no run.json, expected a checkpoint of training or of hf-to-native; "
            "check --native"
        )
    run = RunConfig.from_json((native / "run.json").read_text())
    source = NativeFolder(native)
    got = {key: tensor.shape for key, tensor in source.tensors.items()}
    check_shapes(got, native_shapes(run.model), where=str(native), dropped=options.dropped)
    types = {key: tensor.dtype for key, tensor in source.tensors.items()}
    dtype = check_types(types, where=str(native), wanted=options.dtype)
    maker = HfMaker(run.model, layout, source, dtype, options.checks_finite, file_bytes)
    settings = [run.to_json(), layout, str(dtype), str(options.checks_finite), str(file_bytes)]
    folder = PartialFolder(out, _fingerprint(settings, source.source_files()))
    _fill(maker, folder, options)
    carried = carried_from or native / CARRIED
    base = read_config(carried / CONFIG) if (carried / CONFIG).is_file() else {}
    _carry(carried, folder.path)
    config = make_config(run.model, str(dtype).removeprefix("torch."), base)
    (folder.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    history = read_history(native)
    if history is not None:
        (folder.path / HISTORY).write_text(text_of(history))
    folder.finish()


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
    maker.finish(folder.path, {name: folder.record(name) for name in sizes})


def _fingerprint(settings: list[str], sources: Iterable[Path]) -> str:
    """Return what decides the content; files by size and modification time."""
    stats = [(str(path.resolve()), path.stat()) for path in sources]
    return json.dumps([settings, [(p, s.st_size, s.st_mtime_ns) for p, s in stats]])


def _carry(source: Path, target: Path) -> None:
    """Copy tokenizer, processor, template and code files, but no weights."""
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if path.is_file() and path.name != INDEX and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy2(path, target / path.name)
