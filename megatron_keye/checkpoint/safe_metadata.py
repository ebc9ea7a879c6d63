# SPDX-License-Identifier: Apache-2.0
"""Reads the list of a checkpoint's tensors, and its objects, without running code from either.

torch.distributed.checkpoint writes the list, .metadata, as a pickle and reads it as one, and a
pickle calls whatever it names. Here it may name the classes of that list and nothing else; objects
are read by torch's own reader of plain values and tensors. Nobody else opens a checkpoint's files.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_keye.checkpoint.storage_format import METADATA
from megatron_keye.errors import UserError

_DESCRIPTION = "torch.distributed.checkpoint.metadata"
_CLASSES = frozenset(
    {
        (_DESCRIPTION, "Metadata"),
        (_DESCRIPTION, "MetadataIndex"),
        (_DESCRIPTION, "StorageMeta"),
        (_DESCRIPTION, "TensorStorageMetadata"),
        (_DESCRIPTION, "BytesStorageMetadata"),
        (_DESCRIPTION, "ChunkStorageMetadata"),
        (_DESCRIPTION, "TensorProperties"),
        (_DESCRIPTION, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    }
)
"""What a list consists of, besides the types of numbers."""


def read_metadata(folder: Path) -> Metadata:
    """Read .metadata of a checkpoint.

    Args:
        folder: The checkpoint.

    Returns:
        Its tensors and objects, and where each part of them is; every file lies in the folder.

    Raises:
        UserError: When the file is damaged, names a class that such a list does not have, or a
            file elsewhere.
    """
    file = folder / METADATA
    with undamaged(file), file.open("rb") as stream:
        metadata = _Unpickler(stream, file).load()
        _check(metadata)
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(
                    f"{file}: got a part in {info.relative_path!r}, expected files of the "
                    "checkpoint's own folder; take the checkpoint from where it was saved"
                )
    return metadata  # type: ignore[no-any-return]


def load_plain(stream: IO[bytes], file: Path) -> Any:
    """Return what torch.save wrote: tensors, numbers, texts, and lists and dictionaries of them.

    Args:
        stream: The content, on the CPU when it is read.
        file: The file that it stands in, for the error.

    Raises:
        UserError: When it is damaged or holds any other class.
    """
    with undamaged(file):
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "GLOBAL" not in str(error):
                raise
            named = str(error).split("GLOBAL ", 1)[1].split()[0]
            _refuse(file, named.rstrip("."), "tensors, numbers and texts")


class _Unpickler(pickle.Unpickler):
    """Builds the classes of .metadata and refuses all others before anything is called."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that the pickle names."""
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        _refuse(self._file, f"{module}.{name}", "the tensors of a checkpoint")


def _refuse(file: Path, named: str, expected: str) -> NoReturn:
    raise UserError(
        f"{file}: got {named}, expected {expected} alone; loading it could run code that came "
        "with the file, so take the checkpoint from where it was saved"
    )


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Name the file in what a damaged pickle makes its reader raise, which may be anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{file}: cannot be read ({reason}), expected it whole; it was cut short or damaged, "
            "copy the checkpoint again or take an earlier one"
        ) from error


def _check(metadata: Any) -> None:
    """Raise a TypeError unless the list has the types that its readers rely on."""
    kinds: tuple[tuple[Any, Any, Any], ...] = (
        (metadata.state_dict_metadata, str, TensorStorageMetadata | BytesStorageMetadata),
        (metadata.storage_data, MetadataIndex, _StorageInfo),
    )
    is_list = isinstance(metadata, Metadata)
    for entries, key_kind, kind in kinds:
        pairs = entries.items()
        is_list &= all(isinstance(k, key_kind) and isinstance(v, kind) for k, v in pairs)
    if not is_list:
        raise TypeError("it is no list of tensors")
