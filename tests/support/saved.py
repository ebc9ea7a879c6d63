# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole checkpoints by their manifest, without tensors."""

from pathlib import Path

from megatron_keye.checkpoint.manifest import write_manifest

FILES = ("metadata.json", ".metadata", "__0_0.distcp", "run.json", "hf/LICENSE")


def make_whole(folder: Path) -> Path:
    """Make a folder with the files of a checkpoint, and return it."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder.name}\n")
    write_manifest(folder, {})
    return folder
