# SPDX-License-Identifier: Apache-2.0
"""Positions of picture features in rows: slots for the step's plan, checked against the tokens.

Every rank makes the slots of all rows, so a bad row stops all ranks before any communication.
"""

from collections.abc import Sequence

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.errors import UserError
from megatron_keye.plan.step import PictureSlot


def picture_slots(rows: Sequence[PackedRow], run: RunConfig) -> list[PictureSlot]:
    """List all pictures of a global batch for the plan, by micro-batch order of their rows.

    Raises:
        UserError: When a row's placeholders are not where its pictures belong.
    """
    slots = []
    for number, row in enumerate(rows):
        of_row = [
            PictureSlot(
                row=number,
                index=index,
                start=start,
                num_patches=picture.num_patches,
                num_tokens=picture.num_tokens(run.model.vision.merge_size),
            )
            for index, (picture, start) in enumerate(
                zip(row.pictures, row.picture_starts, strict=True)
            )
        ]
        _check_placeholders(number, row, of_row, run)
        slots += of_row
    return slots


def _check_placeholders(
    number: int, row: PackedRow, slots: list[PictureSlot], run: RunConfig
) -> None:
    """Raise at the first position where placeholders and pictures disagree.

    Equal counts do not suffice: features at the wrong tokens would corrupt training silently.
    """
    edges = np.zeros(len(row.token_ids) + 1, dtype=np.int64)
    np.add.at(edges, [slot.start for slot in slots], 1)
    np.add.at(edges, [slot.start + slot.num_tokens for slot in slots], -1)
    is_planned = np.cumsum(edges[:-1]) > 0
    is_placeholder = np.isin(row.token_ids, run.model.vision_token_ids)
    wrong = np.flatnonzero(is_planned != is_placeholder)
    if len(wrong) == 0:
        return
    position = int(wrong[0])
    document = int(np.searchsorted(row.document_bounds, position, side="right")) - 1
    names = row.sample_names
    replica = number % run.parallel.decoder.data
    raise UserError(
        f"{names[document] if document < len(names) else 'padding'}: position {position} of row "
        f"{number}, for replica {replica} of the decoder, is "
        f"{'a placeholder without' if is_placeholder[position] else 'no placeholder but has'} a "
        "picture's feature; pictures and placeholders of the sample must be at the same positions"
    )
