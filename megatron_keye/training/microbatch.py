"""Cuts a packed row into what one decoder rank works on.

Data and decoder meet here: rows know their documents and pictures, the decoder its position rule,
and the grid which tokens are this rank's.
"""

import numpy as np
import torch

from megatron_keye.config.run import RunConfig
from megatron_keye.data.batch import Batch
from megatron_keye.data.row import IGNORED_LABEL, PackedRow
from megatron_keye.decoder.positions import position_ids
from megatron_keye.parallel.context import gathered_order, owned_positions
from megatron_keye.parallel.grid import DecoderPlace
from megatron_keye.parallel.plan import PictureSlot


def picture_slots(rows: list[PackedRow], merge_size: int) -> list[PictureSlot]:
    """List all pictures of a global batch for the plan, by micro-batch order of their rows."""
    return [
        PictureSlot(
            row=number,
            index=index,
            start=start,
            num_patches=picture.num_patches,
            num_tokens=picture.num_tokens(merge_size),
        )
        for number, row in enumerate(rows)
        for index, (picture, start) in enumerate(
            zip(row.pictures, row.picture_starts, strict=True)
        )
    ]


def cut_row(row: PackedRow, run: RunConfig, place: DecoderPlace) -> Batch:
    """Return the tensors of one row that belong to one decoder rank, on the CPU.

    Args:
        row: The row.
        run: Sizes, placeholders and degrees.
        place: The rank's place in the decoder grid.
    """
    degrees, merge = run.parallel.decoder, run.model.vision.merge_size
    sizes = [(p.grid[0] // merge, p.grid[1] // merge) for p in row.pictures]
    positions = owned_positions(len(row.token_ids), degrees.context, place.context)
    bounds = torch.from_numpy(row.document_bounds)
    document = torch.searchsorted(bounds, positions, right=True) - 1
    token_ids = torch.from_numpy(row.token_ids)[positions]
    embedded = token_ids.view(degrees.tensor, -1)[place.tensor]
    is_vision = torch.isin(embedded, torch.tensor(run.model.vision_token_ids))
    labels = torch.from_numpy(row.labels)[positions]
    is_predicted = labels != IGNORED_LABEL
    ids_3T = position_ids(row.document_bounds, row.picture_starts, sizes)
    return Batch(
        token_ids_BS=token_ids[None],
        label_positions_L=is_predicted.nonzero().squeeze(1),
        labels_L=labels[is_predicted],
        position_ids_3T=torch.from_numpy(ids_3T)[:, positions].contiguous(),
        key_start_T=bounds[document],
        key_end_T=positions + 1,
        is_real_T=positions < row.num_real_tokens,
        gathered_order_S=gathered_order(len(row.token_ids), degrees.context),
        feature_positions_M=is_vision.nonzero().squeeze(1),
    )


def num_real_queries(rows: list[PackedRow]) -> int:
    """Return the positions of a global batch that are not padding."""
    return int(np.sum([row.num_real_tokens for row in rows]))
