"""Makes sure that all ranks train on the same rows and leave out the same samples.

Where bad samples are skipped, a file that only some machines can read would give ranks different
rows, and the first exchange of features would wait for ever. Damage that shows only in decoding is
seen by the one rank that decodes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_keye.data.row import IGNORED_LABEL, PackedRow


def check_same_rows(rows: list[PackedRow] | None, device: torch.device) -> None:
    """Compare this rank's rows with everyone's. All ranks must call it.

    Args:
        rows: All rows of the global batch, as this rank made them; None where it could not.
        device: Where the message's tensor lives.

    Raises:
        RuntimeError: On every rank, when any two ranks have different rows.
    """
    digest = hashlib.blake2b(digest_size=7)
    for row in rows or ():
        pictures = [
            (picture.frame, picture.patch_grid, picture.is_video) for picture in row.pictures
        ]
        digest.update(repr((row.sample_names, pictures)).encode())
        digest.update(row.document_bounds.tobytes())
    mark = int.from_bytes(digest.digest(), "little")
    if rows is None:
        mark = -1
    ends = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    largest, negative_smallest = ends.tolist()
    if largest != -negative_smallest:
        names = ", ".join(name for row in rows or () for name in row.sample_names)
        raise RuntimeError(
            "ranks made different rows, so a sample was skipped on some machines only: samples "
            "and media must be equally readable on all of them. This rank, whose log names what "
            f"it skipped, has {names or 'no rows at all'}"
        )


Damaged = dict[tuple[int, int], str]
"""Why samples of a step are left out, by row and document."""


def damaged_samples(rows: list[PackedRow], failed: Mapping[str, str]) -> Damaged:
    """Find the samples that have a picture of a file that could not be decoded.

    Args:
        rows: Of the global batch.
        failed: Files that could not be decoded, and why.
    """
    damaged: Damaged = {}
    for place, row in enumerate(rows):
        for picture, document in zip(row.pictures, _documents_of_pictures(row), strict=True):
            if picture.medium.path in failed:
                reason = f"{row.sample_names[document]}: {failed[picture.medium.path]}"
                damaged.setdefault((place, document), reason)
    return damaged


def count_with_pictures(rows: list[PackedRow]) -> int:
    """Return how many samples have a picture."""
    return sum(len(set(_documents_of_pictures(row))) for row in rows)


def _documents_of_pictures(row: PackedRow) -> list[int]:
    starts = np.asarray(row.picture_starts, dtype=np.int64)
    documents = np.searchsorted(row.document_bounds, starts, side="right") - 1
    return [int(document) for document in documents]


def agree_on_damaged(damaged: Damaged, device: torch.device) -> Damaged:
    """Gather the damaged samples that ranks came upon. All ranks must call it.

    Args:
        damaged: This rank's, out of the same rows as everyone's.
        device: Where the messages' tensors live.

    Returns:
        Those of all ranks in the order of rows, the same everywhere.
    """
    count = torch.tensor(len(damaged), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if not count:
        return {}
    of_ranks: list[Damaged] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, damaged)
    merged: Damaged = {}
    for rank in reversed(of_ranks):
        merged |= rank
    return dict(sorted(merged.items()))


def without_labels(rows: list[PackedRow], damaged: Damaged) -> list[PackedRow]:
    """Take the labels off damaged samples.

    They stay in their rows, so that everything that was planned holds, and teach nothing.

    Args:
        rows: Of the global batch.
        damaged: As all ranks agreed.
    """
    labels = {place: rows[place].labels.copy() for place, _ in damaged}
    for place, document in damaged:
        start, stop = rows[place].document_bounds[document : document + 2]
        labels[place][start:stop] = IGNORED_LABEL
    return [
        replace(row, labels=labels[place]) if place in labels else row
        for place, row in enumerate(rows)
    ]
