# SPDX-License-Identifier: Apache-2.0
"""2-D rotary positions of patches: half of a head's channels rotate by row, half by column.

Unlike the learned positions, which are interpolated, they encode exact offsets at any size.

Shape letters: P patches, H heads, C channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_keye.vision.patch_grids import PatchGrid


def patch_coordinates(
    patch_grids: Sequence[PatchGrid], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every patch within its frame, int64 [P] each."""
    rows, columns = [], []
    for height, width in patch_grids:
        patches = torch.arange(height * width, device=device)
        rows.append(patches // width)
        columns.append(patches % width)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([empty, *rows]), torch.cat([empty, *columns])


def rotary_tables(
    patch_grids: Sequence[PatchGrid],
    head_dim: int,
    theta: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every patch's angles.

    Each direction has head_dim / 4 frequencies theta^(-i / (head_dim / 4)). The angles of a patch
    are [row angles, column angles], repeated once for rotate-half.

    Args:
        patch_grids: Patches down and across each frame; rows and columns count from 0 in each.
        head_dim: C, a multiple of 4.
        theta: Base of the frequencies.
        dtype: Type of the tables; the angles are computed in float64.
        device: Device of the tables.

    Returns:
        cos_PC and sin_PC.

    Source: released vision tower (`SiglipRotaryEmbedding` of the Keye-VL family).
    """
    num_frequencies = head_dim // 4
    exponents = torch.arange(num_frequencies, device=device, dtype=torch.float64)
    frequencies = theta ** (-exponents / num_frequencies)
    rows_P, columns_P = patch_coordinates(patch_grids, device)
    row_angles = rows_P[:, None] * frequencies
    column_angles = columns_P[:, None] * frequencies
    angles_PC = torch.cat([row_angles, column_angles], dim=1).repeat(1, 2)
    return angles_PC.cos().to(dtype), angles_PC.sin().to(dtype)
