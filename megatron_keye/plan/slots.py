# SPDX-License-Identifier: Apache-2.0
"""The order of a step's rows and the plan of a step, from the sizes of documents and pictures.

Training and estimates call the same functions, so that they agree on the plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.plan.balance import RowCost, order_rows
from megatron_keye.plan.cost import Lengths, attention_flops, vision_cost
from megatron_keye.plan.step import PictureSlot, StepPlan, plan_step


class RowSizes(NamedTuple):
    """What the cost of a row follows from."""

    lengths: Lengths
    """Tokens of each document, padding included, or of each branch where documents branch."""
    patches: Lengths
    """Patches of each picture."""
    num_earlier: Lengths = (0,)
    """Tokens before each branch on its path; 0 for all by default."""
    num_padding: int = 0
    """Tokens of the row that are padding, at its end and in its last document."""
    num_labels: int = 0
    """Tokens that have a label."""

    @property
    def longest_path(self) -> int:
        """Tokens of the longest document, or of the longest path in one."""
        return int(np.add(self.lengths, self.num_earlier).max())


def balanced_order(sizes: Sequence[RowSizes], run: RunConfig) -> list[int]:
    """Return the rows in the order that balances replicas and micro-batches (`order_rows`).

    Args:
        sizes: Of each row.
        run: Sizes and degrees.
    """
    cost = vision_cost(run.model.vision, run.parallel.vision)
    costs = [
        RowCost(
            attention=attention_flops(
                row.lengths,
                run.model.decoder,
                run.training.row_phase(row.longest_path),
                row.num_earlier,
            ),
            vision=float(cost.of_frames(np.asarray(row.patches, dtype=np.int64)).sum()),
        )
        for row in sizes
    ]
    return order_rows(
        costs,
        run.parallel.decoder.data,
        # Where the decoder's ranks encode, they neither start nor end with waiting for vision.
        few_pictures_at_ends=not run.parallel.vision.decoder_encodes,
    )


def plan_slots(
    slots: Sequence[PictureSlot],
    num_rows: int,
    run: RunConfig,
    *,
    returns_gradients: bool | None = None,
) -> StepPlan:
    """Plan the step of a global batch.

    Args:
        slots: All pictures of the global batch, rows ascending.
        num_rows: Rows of the global batch.
        run: Sizes and degrees.
        returns_gradients: Whether gradients of features travel back; by default where the run
            trains vision or the projector.
    """
    if returns_gradients is None:
        returns_gradients = vision_learns(run)
    return plan_step(
        slots,
        num_rows=num_rows,
        row_tokens=run.data.row_tokens,
        parallel=run.parallel,
        cost=vision_cost(run.model.vision, run.parallel.vision),
        returns_gradients=returns_gradients,
    )


def vision_learns(run: RunConfig) -> bool:
    """Return whether ViT or projector is trained, which needs the gradients of features."""
    return bool({"vision", "projector"} & set(run.training.trained_parts))
