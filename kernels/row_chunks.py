# SPDX-License-Identifier: Apache-2.0
"""Runs an operator over a few query rows at a time and joins the results.

Eager operators make matrices of queries by keys; a row of 128K tokens would need tens of
gigabytes for one of them, so no more than a byte budget of it exists at any moment.

Shape letters: T query rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20
"""Bytes that the intermediates of one chunk of rows may take; tests shrink it."""

RowFunction = Callable[..., tuple[Tensor, ...]]
"""Takes a chunk of each row tensor, then the shared tensors; gives tensors of as many rows."""


def rows_of_chunk(bytes_per_row: int) -> int:
    """Return how many rows a chunk has, at least one, for the bytes that a row's share takes."""
    return max(1, CHUNK_BYTES // max(1, bytes_per_row))


def map_row_chunks(
    function: RowFunction,
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    *,
    bytes_per_row: int,
) -> tuple[Tensor, ...]:
    """Return `function(*rows, *shared)`, computed over chunks of rows.

    Under autograd each chunk is recomputed in the backward, so that what is kept between the two
    is the inputs alone. Gradients of `shared` are summed over chunks in the type of `shared`:
    pass them in the accumulation type.

    Args:
        function: Computes some rows; a row of its results may depend on that row only.
        rows: Tensors [T, ...], cut along their first dimension.
        shared: Tensors given whole to every chunk.
        bytes_per_row: Bytes of intermediates that one row needs.

    Returns:
        The results of `function`, each [T, ...].
    """
    num_rows = rows_of_chunk(bytes_per_row)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*rows, *shared)
    )
    results: list[tuple[Tensor, ...]] = []
    for chunk in zip(*(tensor.split(num_rows) for tensor in rows), strict=True):
        if needs_gradient:
            results.append(
                checkpoint(
                    function, *chunk, *shared, use_reentrant=False, preserve_rng_state=False
                )
            )
        else:
            results.append(function(*chunk, *shared))
    return tuple(torch.cat(chunks) for chunks in zip(*results, strict=True))
