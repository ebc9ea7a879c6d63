# SPDX-License-Identifier: Apache-2.0
"""M-RoPE: three positions of every token, and their rotary tables.

Source: positions of the released Keye-VL-2.0 serving code (each image or frame has one time, not
scaled by seconds); contiguous sections as in Qwen2-VL (arXiv 2409.12191).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def position_ids(
    document_bounds: NDArray[np.int64],
    picture_starts: Sequence[int],
    picture_sizes: Sequence[tuple[int, int]],
    parents: Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """Return the time, height and width position of every token of a packed row.

    Text advances all three by one. With s = (largest position so far) + 1, a picture's tokens have
    (s, s + row, s + column), and the next token has s + max(rows, columns). Positions restart at 0
    in each document; where documents branch, each branch goes on from the end of its parent.

    Args:
        document_bounds: int64 [documents + 1], from 0 to the row's length T; of branches where
            documents branch.
        picture_starts: Row position of each picture's first token, ascending.
        picture_sizes: Rows and columns of each picture, in vision tokens.
        parents: For each branch the one that it goes on from, -1 where a document begins; None
            where no document branches.

    Returns:
        int64 [3, T].
    """
    positions = np.empty((3, int(document_bounds[-1])), dtype=np.int64)
    pictures = list(zip(picture_starts, picture_sizes, strict=True))
    parents = parents if parents is not None else [-1] * (len(document_bounds) - 1)
    following: list[int] = []
    for start, end, parent in zip(document_bounds[:-1], document_bounds[1:], parents, strict=True):
        inside = [(p - int(start), size) for p, size in pictures if start <= p < end]
        first = following[parent] if parent >= 0 else 0
        following.append(_fill_branch(positions[:, start:end], inside, first))
    return positions


def _fill_branch(
    positions: NDArray[np.int64], pictures: list[tuple[int, tuple[int, int]]], first: int
) -> int:
    """Fill in positions from `first` on, and return the one that follows them."""
    cursor, value = 0, first
    for start, (rows, columns) in pictures:
        text = start - cursor
        positions[:, cursor:start] = value + np.arange(text)
        value += text
        end = start + rows * columns
        down, across = np.divmod(np.arange(rows * columns), columns)
        positions[:, start:end] = value + np.stack([np.zeros_like(down), down, across])
        value += max(rows, columns)
        cursor = end
    text = positions.shape[1] - cursor
    positions[:, cursor:] = value + np.arange(text)
    return int(value + text)


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
        head_dim: Rotated channels C, 2 x sum(sections).
        sections: Numbers of frequencies for time, height and width, in this order.
        theta: Base of the frequencies theta^(-2i / C).
        dtype: Dtype of angles and tables; float32 except in a float64 run.

    Returns:
        cos and sin [T, C]; both halves of C have the same angles (rotate-half).
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids_3T.device, dtype=dtype)
    frequencies = theta ** (-exponents / head_dim)
    angles = position_ids_3T[..., None].to(dtype) * frequencies
    bounds = pairwise([0, *accumulate(sections)])
    picked = [angles[axis, :, start:end] for axis, (start, end) in enumerate(bounds)]
    both = torch.cat([*picked, *picked], dim=-1)
    return both.cos(), both.sin()
