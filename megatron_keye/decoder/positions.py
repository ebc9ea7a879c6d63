"""3-D rotary positions: the rule that gives every token three positions, and their rotary tables.

Source: the position rule of the released Keye-VL-2.0 serving code (one t = 1 grid an image or
frame, no scaling by time), M-RoPE with contiguous sections as in Qwen2-VL (arXiv 2409.12191).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def position_ids(
    document_bounds: NDArray[np.int64],
    picture_starts: Sequence[int],
    picture_sizes: Sequence[tuple[int, int]],
) -> NDArray[np.int64]:
    """Give every token of a packed row its time, height and width position.

    Text advances all three by one. A picture's tokens start at s = (largest so far) + 1 and stand
    at (s, s + row, s + column); the next token then stands at s + max(rows, columns). Positions
    start again at 0 in each document.

    Args:
        document_bounds: int64 [documents + 1], 0 to the row's length T.
        picture_starts: Row position of each picture's first token, ascending.
        picture_sizes: Rows and columns of each picture in merged tokens.

    Returns:
        int64 [3, T].
    """
    positions = np.empty((3, int(document_bounds[-1])), dtype=np.int64)
    pictures = list(zip(picture_starts, picture_sizes, strict=True))
    for start, end in zip(document_bounds[:-1], document_bounds[1:], strict=True):
        inside = [picture for picture in pictures if start <= picture[0] < end]
        _fill_document(positions[:, start:end], [(p - int(start), size) for p, size in inside])
    return positions


def _fill_document(
    positions: NDArray[np.int64], pictures: list[tuple[int, tuple[int, int]]]
) -> None:
    cursor = value = 0
    for start, (rows, columns) in pictures:
        text = start - cursor
        positions[:, cursor:start] = value + np.arange(text)
        value += text
        end = start + rows * columns
        down, across = np.divmod(np.arange(rows * columns), columns)
        positions[:, start:end] = value + np.stack([np.zeros_like(down), down, across])
        value += max(rows, columns)
        cursor = end
    positions[:, cursor:] = value + np.arange(positions.shape[1] - cursor)


def rotary_table(
    position_ids_3T: Tensor,
    head_dim: int,
    sections: Sequence[int],
    theta: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles.

    Args:
        position_ids_3T: int64 [3, T].
        head_dim: Channels C that are rotated, 2 x sum(sections).
        sections: Frequencies that follow time, height and width, in this order.
        theta: Base of the frequencies theta^(-2i / C).
        dtype: Type of angles and tables; float32 except in a float64 run.

    Returns:
        cos and sin [T, C]; both halves of C carry the same angles (rotate-half).
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids_3T.device, dtype=dtype)
    frequencies = theta ** (-exponents / head_dim)
    angles = position_ids_3T[..., None].to(dtype) * frequencies
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    chosen = torch.tensor(axes, device=angles.device)
    picked = angles.gather(0, chosen.expand(1, *angles.shape[1:])).squeeze(0)
    both = torch.cat([picked, picked], dim=-1)
    return both.cos(), both.sin()
