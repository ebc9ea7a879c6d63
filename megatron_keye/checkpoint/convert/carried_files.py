# SPDX-License-Identifier: Apache-2.0
"""The small files that travel with weights: tokenizer, template, processor, code, licence.

They lie in a folder of each native checkpoint, so that a copy of one checkpoint can be served
after an export. Which of them a server needs is known here too.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError

CARRIED = "hf"
"""Folder in a native checkpoint, and beside the checkpoints of a run, for these files."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_LARGEST_BYTES = 64 * 2**20
"""A larger file holds weights or data of another kind."""
_TEMPLATE_FOLDER = "additional_chat_templates"

_logger = logging.getLogger(__name__)

Files = Mapping[str, Path]
"""Location of each file by its name in the checkpoint."""


def find_files(*folders: Path) -> dict[str, Path]:
    """Return the files that travel with weights; a later folder's replace those of that name.

    What a user might miss is logged: subfolders, and files that are too large.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        files |= _files_of(folder)
        if left_out := _left_out(folder):
            _logger.warning("%s: not carried along: %s", folder, ", ".join(left_out))
    return files


def _files_of(folder: Path) -> dict[str, Path]:
    paths = [*folder.glob("*"), *folder.glob(f"{_TEMPLATE_FOLDER}/*")]
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(paths)
        if path.is_file() and _is_carried(path)
    }


def _left_out(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.glob("[!.]*")
        if (path.is_dir() and path.name != _TEMPLATE_FOLDER)
        or (path.is_file() and not _is_carried(path) and not _is_weight(path))
    )


def copy_files(files: Files, folder: Path) -> None:
    """Copy files into a folder, which must exist."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy2(path, folder / name)


def carry_on(source: Path, target: Path) -> None:
    """Copy the files of one checkpoint or run to another, in place of those it had.

    Args:
        source: Folder of a checkpoint or a run; without such files nothing happens.
        target: The other one; made where it is absent.
    """
    if not (source / CARRIED).is_dir():
        return
    partial = target / f"{CARRIED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / CARRIED, partial)
    shutil.rmtree(target / CARRIED, ignore_errors=True)
    partial.rename(target / CARRIED)


def check_files_from(folder: Path) -> None:
    """Raise a UserError unless a user's folder has files to carry."""
    if not folder.is_dir() or not _files_of(folder):
        got = "no file of a tokenizer, processor or model" if folder.is_dir() else "no such folder"
        raise UserError(
            f"--files-from: got {got} at {folder}, expected the folder of the released model or "
            "of another one with its tokenizer and processor; check the path"
        )


def find_missing(files: Files, config: Mapping[str, Any]) -> list[str]:
    """Return what a server will miss in a checkpoint, one phrase each.

    Args:
        files: Its small files.
        config: Its config.json.

    Raises:
        UserError: For a file that is no JSON.
    """
    tokenizer = _read(files, "tokenizer_config.json")
    generation = _read(files, "generation_config.json")
    has_vocabulary = (
        "tokenizer.json" in files
        or {"vocab.json", "merges.txt"} <= files.keys()
        or any(name.endswith((".tiktoken", "tokenizer.model")) for name in files)
    )
    has_template = tokenizer.get("chat_template") or any("chat_template" in name for name in files)
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    needed = {
        "tokenizer.json (text can't be read)": has_vocabulary,
        "tokenizer_config.json (special tokens are unknown)": tokenizer,
        "chat_template.jinja (conversations can't be written as a prompt)": has_template,
        "generation_config.json (sampling is left to the server)": generation,
        "eos_token_id in generation_config.json or config.json (answers do not end)": ends
        is not None,
        "preprocessor_config.json or processor_config.json (pictures can't be read)": (
            "preprocessor_config.json" in files or "processor_config.json" in files
        ),
        "auto_map in config.json (the classes of the model are not found)": config.get("auto_map"),
    }
    missing = [phrase for phrase, held in needed.items() if not held]
    return missing + [f"{name} (auto_map names it)" for name in _missing_code(files, config)]


def _missing_code(files: Files, config: Mapping[str, Any]) -> list[str]:
    """Return the Python files that an auto_map names and that are absent."""
    described = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    maps = [part.get("auto_map") for part in (config, *(_read(files, name) for name in described))]
    named = {name for each in maps for name in _code_files(each)}
    return sorted(named - files.keys())


def _code_files(auto_map: Any) -> Iterator[str]:
    """Yield the files of "module.Class", in an auto_map's lists and objects, nulls left out."""
    if isinstance(auto_map, Mapping):
        auto_map = list(auto_map.values())
    if isinstance(auto_map, list):
        for each in auto_map:
            yield from _code_files(each)
    # REPOSITORY--module.Class lies elsewhere.
    elif isinstance(auto_map, str) and "." in auto_map and "--" not in auto_map:
        yield auto_map.rpartition(".")[0].replace(".", "/") + ".py"


def _read(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name].read_text())
    except ValueError as error:
        raise UserError(
            f"{files[name]}: got {error}, expected a JSON file; copy it again"
        ) from error
    return content if isinstance(content, dict) else {}


def _is_weight(path: Path) -> bool:
    return path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))


def _is_carried(path: Path) -> bool:
    is_small = path.stat().st_size <= _LARGEST_BYTES
    return is_small and not _is_weight(path) and not path.name.startswith(".")
