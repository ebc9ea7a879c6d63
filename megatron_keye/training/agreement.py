# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks train on the same rows and leave out the same samples.

With data.on_bad_sample=skip, a file that only some machines can read would lead to different rows
on different ranks, and to a deadlock at the first exchange of features. Damage that shows only in
decoding is seen by one rank alone.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_keye.data.row import IGNORED_LABEL, PackedRow


def check_same_rows(rows: list[PackedRow] | None, device: torch.device) -> None:
    """Check that all ranks have the same rows. All ranks must call it.

    Args:
        rows: All rows of the global batch, as this rank made them; None if it failed to.
        device: Device of the message.

    Raises:
        RuntimeError: On every rank, if any two ranks have different rows.
    """
    digest = hashlib.blake2b(digest_size=7)
    for row in rows or ():
        pictures = [
            (picture.frame, picture.patch_grid, picture.is_video) for picture in row.pictures
        ]
        digest.update(repr((row.sample_names, pictures)).encode())
        digest.update(row.branches.bounds.tobytes())
        digest.update(row.branches.parents.tobytes())
    number = int.from_bytes(digest.digest(), "little")
    if rows is None:
        number = -1
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, negative_smallest = extremes.tolist()
    if largest != -negative_smallest:
        names = ", ".join(name for row in rows or () for name in row.sample_names)
        raise RuntimeError(
            "got different rows on different ranks, expected the same: a sample was skipped on "
            "some machines only; make samples and media readable on all of them. This rank, whose "
            f"log names what it skipped, has {names or 'no rows'}"
        )


Damaged = dict[tuple[int, int], str]
"""Why samples of a step are left out, by index of the row and of the document in it."""


def damaged_samples(rows: list[PackedRow], failed: Mapping[str, str]) -> Damaged:
    """Return the samples that have a picture from a file that could not be decoded.

    Args:
        rows: Rows of the global batch.
        failed: Reason by path, for files that could not be decoded.
    """
    damaged: Damaged = {}
    for index, row in enumerate(rows):
        for picture, document in zip(row.pictures, _documents_of_pictures(row), strict=True):
            if picture.medium.path in failed:
                reason = f"{row.sample_names[document]}: {failed[picture.medium.path]}"
                damaged.setdefault((index, document), reason)
    return damaged


def count_samples_with_pictures(rows: list[PackedRow]) -> int:
    """Return the number of samples that have a picture."""
    return sum(len(set(_documents_of_pictures(row))) for row in rows)


def _documents_of_pictures(row: PackedRow) -> list[int]:
    starts = np.asarray(row.picture_starts, dtype=np.int64)
    documents = np.searchsorted(row.document_bounds, starts, side="right") - 1
    return [int(document) for document in documents]


def agree_on_damaged(damaged: Damaged, device: torch.device) -> Damaged:
    """Merge the damaged samples that each rank found. All ranks must call it.

    Args:
        damaged: Samples that this rank found, in rows that are the same on all ranks.
        device: Device of the messages.

    Returns:
        Those of all ranks, in row order, the same on every rank.
    """
    count = torch.tensor(len(damaged), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if not count:
        return {}
    gathered: list[Damaged] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, damaged)
    merged: Damaged = {}
    for of_rank in reversed(gathered):
        merged |= of_rank
    return dict(sorted(merged.items()))


def without_labels(rows: list[PackedRow], damaged: Damaged) -> list[PackedRow]:
    """Return the rows with the labels of damaged samples masked.

    The samples stay in their rows, so that the plan remains valid, but have no loss.

    Args:
        rows: Rows of the global batch.
        damaged: Result of `agree_on_damaged`.
    """
    labels = {index: rows[index].labels.copy() for index, _ in damaged}
    for index, document in damaged:
        start, stop = rows[index].document_bounds[document : document + 2]
        labels[index][start:stop] = IGNORED_LABEL
    return [
        replace(row, labels=labels[index]) if index in labels else row
        for index, row in enumerate(rows)
    ]
