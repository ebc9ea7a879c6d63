# SPDX-License-Identifier: Apache-2.0
"""Opens a Hugging Face checkpoint for running it: its sizes and the location of its tensors."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_keye.checkpoint.hf.config import CONFIG, model_from_config, read_config
from megatron_keye.checkpoint.hf.model_kinds import check_names, check_not_quantised
from megatron_keye.checkpoint.hf.parameter_shapes import (
    PACKING_TABLE,
    ExpertLayout,
    layout_of,
    parameter_shapes,
)
from megatron_keye.checkpoint.hf.safetensors_index import TYPE_NAMES, Entry, open_folder
from megatron_keye.config import ModelConfig
from megatron_keye.errors import UserError


@dataclass(frozen=True)
class HfFolder:
    """One checkpoint whose tensors fit its config.json."""

    path: Path
    """The folder."""
    model: ModelConfig
    """Sizes."""
    layout: ExpertLayout
    """Its expert layout."""
    entries: dict[str, Entry]
    """Location of each tensor."""
    unused: list[str]
    """Tensors that the model does not have."""

    def read(self, name: str) -> Tensor:
        """Return one tensor, which must not be written to."""
        return self.entries[name].read()


def open_unquantised(path: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, Entry]:
    """Open a folder of config.json and *.safetensors that may hold weights of ours.

    Args:
        path: The folder.
        prefixes: Beginnings of the names that count; other tensors may be of any kind.

    Returns:
        The entry of each tensor.

    Raises:
        UserError: For a broken or incomplete folder, or one of another kind.
    """
    entries = open_folder(path)
    types = {
        name: TYPE_NAMES[entry.dtype]
        for name, entry in entries.items()
        if name.startswith(prefixes)
    }
    check_not_quantised(read_config(path / CONFIG), types, path)
    check_names(types, path)
    return entries


def open_hf(path: Path) -> HfFolder:
    """Open a checkpoint of any sizes.

    Args:
        path: Holds config.json and *.safetensors.

    Raises:
        UserError: For a broken file, or a tensor that is missing or does not fit config.json.
    """
    entries = open_unquantised(path)
    rows = entries[PACKING_TABLE].shape[0] if PACKING_TABLE in entries else 0
    model = model_from_config(path / CONFIG, num_packing_positions=rows)
    layout = layout_of(entries)
    expected = parameter_shapes(model, layout)
    for name, shape in expected.items():
        got = list(entries[name].shape) if name in entries else None
        if got != list(shape):
            raise UserError(
                f"tensor {name}: got {'none' if got is None else f'shape {got}'} in {path}, "
                f"expected shape {list(shape)}; complete the folder, or correct {CONFIG}"
            )
    unused = [name for name in entries if name not in expected]
    return HfFolder(path, model, layout, entries, unused)
