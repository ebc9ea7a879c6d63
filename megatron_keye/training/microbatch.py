"""Turns the rows of a global batch into what ranks work on: their order, the plan, tensors.

Data and decoder meet here: rows know their documents and pictures, the decoder its position rule,
and the grid which tokens are this rank's.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_keye.config.run import RunConfig
from megatron_keye.data.batch import Batch
from megatron_keye.data.row import IGNORED_LABEL, PackedRow
from megatron_keye.decoder.positions import position_ids
from megatron_keye.parallel.balance import RowCost, order_rows
from megatron_keye.parallel.context import gathered_order, owned_positions
from megatron_keye.parallel.cost import attention_flops, vision_cost
from megatron_keye.parallel.grid import DecoderPlace
from megatron_keye.parallel.plan import PictureSlot, StepPlan, plan_step


def balance_rows(rows: list[PackedRow], run: RunConfig) -> list[PackedRow]:
    """Return the rows in the order that spreads their cost over replicas and micro-batches.

    The loss is a sum over the global batch, so their order changes rounding alone.
    """
    sizes = [
        (np.diff(row.document_bounds).tolist(), [p.num_patches for p in row.pictures])
        for row in rows
    ]
    return [rows[place] for place in balanced_order(sizes, run)]


def balanced_order(
    sizes: Sequence[tuple[Sequence[int], Sequence[int]]], run: RunConfig
) -> list[int]:
    """Return the order of `balance_rows`, from sizes alone.

    Args:
        sizes: Of each row, the tokens of its documents and the patches of its pictures.
        run: Sizes and degrees.
    """
    cost = vision_cost(run.model.vision, run.parallel.vision)
    costs = [
        RowCost(
            attention=attention_flops(
                lengths, run.model.decoder, run.training.row_phase(max(lengths))
            ),
            vision=sum(map(cost.of_frame, patches)),
        )
        for lengths, patches in sizes
    ]
    return order_rows(costs, run.parallel.decoder.data)


def plan_rows(rows: list[PackedRow], run: RunConfig) -> StepPlan:
    """Plan the step of a global batch.

    Args:
        rows: In the order in which they are decoded.
        run: Sizes and degrees.

    Raises:
        ValueError: When a row's placeholders are not where its pictures go.
    """
    return plan_slots(picture_slots(rows, run), len(rows), run)


def plan_slots(slots: Sequence[PictureSlot], num_rows: int, run: RunConfig) -> StepPlan:
    """Return the plan of `plan_rows`, from the places of pictures alone.

    Args:
        slots: All pictures of the global batch, rows ascending.
        num_rows: Rows of the global batch.
        run: Sizes and degrees.
    """
    return plan_step(
        slots,
        num_rows=num_rows,
        row_tokens=run.data.row_tokens,
        parallel=run.parallel,
        cost=vision_cost(run.model.vision, run.parallel.vision),
        returns_gradients=returns_gradients(run),
    )


def returns_gradients(run: RunConfig) -> bool:
    """Tell whether anything in front of the decoder learns from the features' gradients."""
    return bool({"vision", "projector"} & set(run.training.trained_parts))


def picture_slots(rows: list[PackedRow], run: RunConfig) -> list[PictureSlot]:
    """List all pictures of a global batch for the plan, by micro-batch order of their rows.

    Raises:
        ValueError: When a row's placeholders are not where its pictures go. All ranks see all
            rows, so all of them stop before any message.
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

    Equal counts would not do: features at the wrong tokens train on nonsense without any sign.
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
    raise ValueError(
        f"{names[document] if document < len(names) else 'padding'}: position {position} of row "
        f"{number}, for replica {replica} of the decoder, is "
        f"{'a placeholder without' if is_placeholder[position] else 'no placeholder but has'} a "
        "picture's feature; pictures and placeholders of the sample must come in the same places"
    )


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
