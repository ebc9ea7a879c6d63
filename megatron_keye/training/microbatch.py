# SPDX-License-Identifier: Apache-2.0
"""Turns the rows of a global batch into their order, the step's plan and each rank's tensors.

It combines documents and pictures from the data, position ids from the decoder, and the tokens
that a rank holds from its grid.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_keye.config.run import RunConfig
from megatron_keye.data.placeholders import picture_slots
from megatron_keye.data.row import IGNORED_LABEL, NO_EXPERT, PackedRow
from megatron_keye.decoder.batch import AnswerBatch, Batch
from megatron_keye.decoder.positions import position_ids
from megatron_keye.decoder.routes import Routes
from megatron_keye.parallel.context import gathered_order
from megatron_keye.plan.places import DecoderPlace, owned_positions
from megatron_keye.plan.slots import balanced_order, plan_slots
from megatron_keye.plan.step import StepPlan


def balance_rows(rows: list[PackedRow], run: RunConfig) -> list[PackedRow]:
    """Return the rows in the order that balances replicas and micro-batches.

    The loss is a sum over the global batch, so their order changes only rounding.
    """
    return [rows[place] for place in balanced_order([row.sizes for row in rows], run)]


def plan_rows(
    rows: list[PackedRow], run: RunConfig, *, returns_gradients: bool | None = None
) -> StepPlan:
    """Plan the step of a global batch.

    Args:
        rows: In the order in which the decoder runs them.
        run: Sizes and degrees.
        returns_gradients: Whether gradients of features travel back; by default where the run
            trains vision or the projector.

    Raises:
        UserError: If a row's placeholders are not where its pictures go.
    """
    slots = picture_slots(rows, run)
    return plan_slots(slots, len(rows), run, returns_gradients=returns_gradients)


def cut_row(row: PackedRow, run: RunConfig, place: DecoderPlace) -> Batch:
    """Return the tensors of one row that belong to one decoder rank, on the CPU.

    Args:
        row: The row.
        run: Sizes, placeholders and degrees.
        place: The rank's coordinates in the decoder grid.
    """
    degrees, merge = run.parallel.decoder, run.model.vision.merge_size
    sizes = [(p.patch_grid[0] // merge, p.patch_grid[1] // merge) for p in row.pictures]
    owned = owned_positions(len(row.token_ids), degrees.context, place.context)
    positions = torch.from_numpy(owned)
    document = np.searchsorted(row.document_bounds, owned, side="right") - 1
    token_ids = torch.from_numpy(row.token_ids)[positions]
    embedded = token_ids.view(degrees.tensor, -1)[place.tensor]
    is_vision = torch.isin(embedded, torch.tensor(run.model.vision_token_ids))
    labels = torch.from_numpy(row.labels)[positions]
    is_predicted = labels != IGNORED_LABEL
    trees = row.prefix_trees
    branches = row.branches
    ids_3T = position_ids(branches.bounds, row.picture_starts, sizes, branches.parents.tolist())
    return Batch(
        token_ids_BS=token_ids[None],
        label_positions_L=is_predicted.nonzero().squeeze(1),
        labels_L=labels[is_predicted],
        weights_L=torch.from_numpy(row.weights)[positions][is_predicted],
        position_ids_3T=torch.from_numpy(ids_3T)[:, positions].contiguous(),
        key_start_T=torch.from_numpy(row.document_bounds[document]),
        key_end_T=positions + 1,
        key_reach_S=None if trees is None else torch.from_numpy(trees.key_reach),
        num_paths_T=None if trees is None else torch.from_numpy(trees.num_paths[owned]),
        is_real_T=positions < row.num_real_tokens,
        gathered_order_S=gathered_order(len(row.token_ids), degrees.context),
        feature_positions_M=is_vision.nonzero().squeeze(1),
        routes=_cut_routes(row, np.split(owned, degrees.tensor)[place.tensor]),
        answers=_cut_answers(row, owned),
    )


def _cut_routes(row: PackedRow, routed: NDArray[np.int64]) -> Routes | None:
    """Return where the tokens go that a rank routes, None where routers choose.

    Args:
        row: The row.
        routed: Positions of these tokens.
    """
    if row.routes is None:
        return None
    experts = row.routes[routed]
    is_known = experts[:, 0, 0] != NO_EXPERT
    known = np.where(is_known[:, None, None], experts, 0)
    return Routes(torch.from_numpy(known), torch.from_numpy(is_known))


def _cut_answers(row: PackedRow, owned: NDArray[np.int64]) -> AnswerBatch | None:
    """Return what belongs to the labels at the positions that a rank owns, None without answers.

    Args:
        row: The row.
        owned: Positions, in the rank's order.
    """
    if row.answers is None:
        return None
    is_label = row.labels != IGNORED_LABEL
    labels = (np.cumsum(is_label) - 1)[owned][is_label[owned]]
    return AnswerBatch(
        answers_L=torch.from_numpy(row.answers.answers[labels]),
        places_L=torch.from_numpy(row.answers.places[labels]),
        old_log_probs_L=torch.from_numpy(row.answers.old_log_probs[labels]),
        advantages_A=torch.from_numpy(row.answers.advantages),
    )
