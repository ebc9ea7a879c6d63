# SPDX-License-Identifier: Apache-2.0
"""One row of inputs from an .npz file, as verify_checkpoint takes it.

Checked in full before any model is built, so that each mistake gives a clear message.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.config import ModelConfig
from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.decoder.batch import Batch
from megatron_keye.decoder.positions import position_ids
from megatron_keye.errors import UserError

Arrays = Mapping[str, NDArray[Any]]

KNOWN = (
    "input_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "cu_seqlens",
    "position_ids",
    "targets",
)
"""Every array that a file may hold; only the first is required."""


@dataclass(frozen=True)
class Pictures:
    """Images or video frames, in the order of their placeholders."""

    patches: Tensor
    """float32 [P, 3, patch, patch], each picture in raster order."""
    patch_grids: list[tuple[int, int]]
    """Patches down and across each picture."""
    positions: Tensor
    """int64 [M], ascending: the row positions of all placeholders."""


@dataclass(frozen=True, kw_only=True)
class DumpInputs:
    """One row, ready for the model."""

    token_ids: Tensor
    """int64 [T]."""
    images: Pictures
    """Images; may be empty."""
    videos: Pictures
    """Frames; may be empty."""
    document_bounds: Tensor
    """int64 [documents + 1], 0 to T."""
    position_ids: Tensor
    """int64 [3, T], given or computed."""
    targets: Tensor | None
    """int64 [T], -100 where there is none; None when the file has no targets."""

    def batch(self) -> Batch:
        """Return the row as the decoder takes it; features are [images, videos] in row order."""
        positions = torch.arange(len(self.token_ids))
        document = torch.searchsorted(self.document_bounds, positions, right=True) - 1
        targets = self.targets if self.targets is not None else self.token_ids[:0]
        is_predicted = targets != IGNORED_LABEL
        return Batch(
            token_ids_BS=self.token_ids[None],
            label_positions_L=is_predicted.nonzero().squeeze(1),
            labels_L=targets[is_predicted],
            weights_L=torch.ones(int(is_predicted.sum())),
            position_ids_3T=self.position_ids,
            key_start_T=self.document_bounds[document],
            key_end_T=positions + 1,
            is_real_T=torch.ones_like(positions, dtype=torch.bool),
            gathered_order_S=positions,
            feature_positions_M=self._placeholders().sort().values,
        )

    def feature_order(self) -> Tensor:
        """Return int64 [M] that sorts the features [images, videos] into row order."""
        return self._placeholders().argsort()

    def _placeholders(self) -> Tensor:
        return torch.cat([self.images.positions, self.videos.positions])


def read_inputs(path: Path, model: ModelConfig) -> DumpInputs:
    """Read an .npz file.

    Args:
        path: The file.
        model: Sizes and placeholders that the inputs must fit.

    Raises:
        UserError: Naming the array, what was got and what was expected.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(
            f"--inputs {path}: got a file that NumPy cannot read ({error}), expected an .npz "
            "archive; write it with numpy.savez"
        ) from error
    return inputs_from_arrays(arrays, model)


def inputs_from_arrays(arrays: Arrays, model: ModelConfig) -> DumpInputs:
    """Check arrays named as in KNOWN and convert them to inputs.

    Args:
        arrays: Shapes and types as `megatron-keye verify --help` lists them.
        model: Sizes and placeholders that the inputs must fit.

    Raises:
        UserError: Naming the array, what was got and what was expected.
    """
    for name in arrays:
        _require(name in KNOWN, "the inputs", f"an array {name!r}", f"only {', '.join(KNOWN)}")
    _require("input_ids" in arrays, "the inputs", "no input_ids", "int64 [T]")
    token_ids = _integers(arrays, "input_ids", (None,))
    size = model.decoder.vocab_size
    _require_range("input_ids", token_ids, 0, size)
    images = _pictures(arrays, "pixel_values", "image_grid_thw", model, model.image_token_id)
    videos = _pictures(
        arrays, "pixel_values_videos", "video_grid_thw", model, model.video_token_id
    )
    bounds = _bounds(arrays, len(token_ids))
    targets = None
    if "targets" in arrays:
        targets = _integers(arrays, "targets", (len(token_ids),))
        _require_range("targets", targets[targets != IGNORED_LABEL], 0, size)
    return DumpInputs(
        token_ids=torch.from_numpy(token_ids),
        images=images,
        videos=videos,
        document_bounds=torch.from_numpy(bounds),
        position_ids=torch.from_numpy(_positions(arrays, bounds, (images, videos), model)),
        targets=None if targets is None else torch.from_numpy(targets),
    )


def _require(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: got {got}, expected {expected}; correct the file of --inputs")


def _require_range(name: str, values: NDArray[np.int64], start: int, end: int) -> None:
    outside = values[(values < start) | (values >= end)]
    first = outside[0] if len(outside) else None
    _require(first is None, name, first, f"ids from {start} to {end - 1}")


def _integers(arrays: Arrays, name: str, shape: tuple[int | None, ...]) -> NDArray[np.int64]:
    """Return an array of integers as int64 after checking its shape; None means any size."""
    array = arrays[name]
    _require(array.dtype.kind in "iu", name, f"type {array.dtype}", "int64")
    _require_shape(name, array, shape)
    return array.astype(np.int64)


def _require_shape(name: str, array: NDArray[Any], shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(
        wanted in (None, got) for wanted, got in zip(shape, array.shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    _require(fits, name, f"shape {list(array.shape)}", f"[{wanted}]")


def _pictures(
    arrays: Arrays, pixels: str, patch_grids: str, model: ModelConfig, token_id: int
) -> Pictures:
    """Return the pictures of one kind after checking them against their placeholders."""
    side, merge = model.vision.patch_size, model.vision.merge_size
    positions = np.flatnonzero(arrays["input_ids"] == token_id)
    given = {name for name in (pixels, patch_grids) if name in arrays}
    _require(
        len(given) != 1, pixels, f"only {', '.join(given)}", f"{pixels} and {patch_grids} together"
    )
    if not given:
        patches, rows = np.empty((0, 3, side, side)), np.empty((0, 3), dtype=np.int64)
    else:
        patches, rows = arrays[pixels], _integers(arrays, patch_grids, (None, 3))
        _require(patches.dtype.kind == "f", pixels, f"type {patches.dtype}", "float32")
    _require_shape(pixels, patches, (None, 3, side, side))
    for time, height, width in rows.tolist():
        fits = time == 1 and min(height, width) > 0 and not (height % merge or width % merge)
        _require(
            fits,
            patch_grids,
            [time, height, width],
            f"rows [1, h, w] of positive multiples of {merge}",
        )
    sizes = [(height, width) for _, height, width in rows.tolist()]
    num_patches = sum(height * width for height, width in sizes)
    _require(len(patches) == num_patches, pixels, f"{len(patches)} patches", f"{num_patches}")
    num_tokens = num_patches // merge**2
    _require(
        len(positions) == num_tokens,
        "input_ids",
        f"{len(positions)} placeholders {token_id}",
        f"{num_tokens}, the sum over {patch_grids}",
    )
    return Pictures(torch.from_numpy(patches), sizes, torch.from_numpy(positions))


def _bounds(arrays: Arrays, length: int) -> NDArray[np.int64]:
    if "cu_seqlens" not in arrays:
        return np.array([0, length], dtype=np.int64)
    bounds = _integers(arrays, "cu_seqlens", (None,))
    fits = len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == length
    _require(
        fits and bool((np.diff(bounds) >= 0).all()),
        "cu_seqlens",
        bounds.tolist(),
        f"ascending numbers from 0 to {length}",
    )
    return bounds


def _positions(
    arrays: Arrays, bounds: NDArray[np.int64], kinds: tuple[Pictures, ...], model: ModelConfig
) -> NDArray[np.int64]:
    """Return the given position ids, or those that follow from the placeholders."""
    if "position_ids" in arrays:
        given = _integers(arrays, "position_ids", (3, int(bounds[-1])))
        return np.ascontiguousarray(given)
    merge = model.vision.merge_size
    found = []
    for pictures in kinds:
        positions, taken = pictures.positions.tolist(), 0
        for height, width in pictures.patch_grids:
            cells = (height // merge, width // merge)
            own = positions[taken : taken + cells[0] * cells[1]]
            taken += len(own)
            in_row = own[-1] - own[0] == len(own) - 1
            one_document = np.searchsorted(bounds, own[0], "right") == np.searchsorted(
                bounds, own[-1], "right"
            )
            _require(
                bool(in_row and one_document),
                "input_ids",
                f"{len(own)} placeholders spread from {own[0]} to {own[-1]}",
                "those of one picture side by side in one document, or position_ids beside them",
            )
            found.append((own[0], cells))
    found.sort()
    return position_ids(bounds, [start for start, _ in found], [size for _, size in found])
