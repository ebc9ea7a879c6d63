"""Plans that ignore costs: baselines of the balanced one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.forecast import RowShape, picture_slots_of
from megatron_keye.plan.places import vision_ranks
from megatron_keye.plan.slots import vision_learns
from megatron_keye.plan.step import Chunk, PictureSlot, StepPlan, plan_messages


def plan_dealt(
    rows: Sequence[RowShape], run: RunConfig, *, deal: Literal["documents", "counts"]
) -> StepPlan:
    """Return a plan that ignores costs, as a baseline.

    Args:
        rows: In the order in which the decoder runs them.
        run: Sizes and degrees.
        deal: "documents": whole documents round-robin, as data parallelism over samples does.
            "counts": the same number of consecutive pictures for each rank.
    """
    ranks = vision_ranks(run.parallel)
    if deal == "documents":
        shares = _pictures_by_document(rows)
    else:
        slots = picture_slots_of(rows)
        bounds = np.linspace(0, len(slots), len(ranks) + 1).astype(int).tolist()
        shares = [slots[start:end] for start, end in pairwise(bounds) if start < end]
    chunks: list[Chunk] = []
    for number, share in enumerate(shares):
        pictures: list[PictureSlot] = []
        rank = ranks[number % len(ranks)]
        for slot in share:
            patches = sum(picture.num_patches for picture in pictures) + slot.num_patches
            if pictures and patches > run.parallel.vision.chunk_patches:
                chunks.append(Chunk(vision_rank=rank, pictures=tuple(pictures)))
                pictures = []
            pictures.append(slot)
        chunks.append(Chunk(vision_rank=rank, pictures=tuple(pictures)))
    return plan_messages(
        chunks,
        num_rows=len(rows),
        row_tokens=run.data.row_tokens,
        parallel=run.parallel,
        returns_gradients=vision_learns(run),
    )


def _pictures_by_document(rows: Sequence[RowShape]) -> list[list[PictureSlot]]:
    """Return the pictures of each document that has any, in row order."""
    documents: list[list[PictureSlot]] = []
    slots = iter(picture_slots_of(rows))
    for row in rows:
        ends, end = [], 0
        for length in row.document_lengths:
            end += length
            ends.append(end)
        by_document: dict[int, list[PictureSlot]] = {}
        for _ in row.pictures:
            slot = next(slots)
            document = sum(e <= slot.start for e in ends)
            by_document.setdefault(document, []).append(slot)
        documents += by_document.values()
    return documents
