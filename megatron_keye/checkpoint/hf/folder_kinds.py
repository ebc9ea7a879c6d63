# SPDX-License-Identifier: Apache-2.0
"""Recognises folders and files that are no checkpoint in safetensors, and says what to do."""

from collections.abc import Iterator
from pathlib import Path

from megatron_keye.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the text that stands for a file in a git clone without LFS."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOADS = ".cache/huggingface/download"
"""Where the hub's client keeps what it has not finished."""
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload", "*.download")


def check_folder(folder: Path) -> None:
    """Raise a UserError for anything but a folder of whole models in safetensors.

    Args:
        folder: What a user gave as a checkpoint.
    """
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: got adapter_config.json, expected a whole model; this is a LoRA "
                "adapter, merge it into its base model first (PEFT: merge_and_unload)"
            )
        return
    got, remedy = next(_kinds(folder))
    raise UserError(
        f"{folder}: got {got}, expected a checkpoint folder with *.safetensors; {remedy}"
    )


def _kinds(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what a folder without safetensors holds, and what to do; the first is meant."""
    if folder.is_file():
        if folder.suffix == ".gguf":
            yield "a GGUF file", "its weights are quantised, take the original"
        yield "a file", "give the folder that holds it"
    if not folder.is_dir():
        yield "no such folder", "check the path"
    if (folder / "metadata.json").is_file() and (folder / ".metadata").is_file():
        yield "a native checkpoint", "convert it with native-to-hf"
    if (folder / "adapter_config.json").is_file():
        yield "a LoRA adapter", "merge it into its base model first (PEFT: merge_and_unload)"
    if any(folder.glob("*.gguf")):
        yield "GGUF files", "their weights are quantised, take the original"
    if (folder / "snapshots").is_dir():
        snapshots = sorted(path.name for path in (folder / "snapshots").iterdir())
        name = snapshots[-1] if snapshots else "NAME"
        yield "a cache of the Hugging Face hub", f"give {folder / 'snapshots' / name}"
    for pattern in _UNFINISHED:
        for path in [*folder.glob(pattern), *folder.glob(f"{_DOWNLOADS}/**/{pattern}")]:
            yield f"the unfinished download {path.name}", "finish the download"
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            yield (
                f"{path.name} and no safetensors",
                "take the safetensors of the same model, or load and save it with transformers",
            )
    yield "no *.safetensors file", "check the path"
