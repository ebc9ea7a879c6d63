# SPDX-License-Identifier: Apache-2.0
"""Summarises one estimated step of a run's own samples: chunks, idle shares, exchanges."""

from typing import Any

import numpy as np

from megatron_keye.config import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.estimate.forecast import Forecast, Speeds, try_vision_ranks
from megatron_keye.estimate.workload import (
    BatchPictures,
    RowShape,
    balance_shapes,
    plan_balanced,
    shape_of,
)


def summarize_step(run: RunConfig, number: int, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of one step with the expected idle share of each rank, ready for JSON.

    Args:
        run: The run; its samples are read.
        number: 0-based number of the step.
        suggests: Whether to simulate other numbers of vision ranks too.

    Raises:
        UserError: For samples that cannot be read.
    """
    rows = balance_shapes(read_rows(run, number), run)
    work, speeds = plan_balanced(rows, run), Speeds()
    simulated = Forecast(rows, run, speeds).play(work)
    shared = run.parallel.vision.shared_micro_batches
    suggestions = (
        try_vision_ranks(rows, run, speeds, shared_micro_batches=shared) if suggests else []
    )
    pictures, num_ranks = BatchPictures.of_rows(rows), run.parallel.num_ranks
    patches = np.bincount(work.ranks[work.chunk_of_picture], pictures.patches, minlength=num_ranks)
    chunks = np.bincount(work.ranks, minlength=num_ranks)
    return {
        "step": number,
        "pictures": len(pictures.patches),
        "ranks": [
            {
                "chunks": int(chunks[rank]),
                "patches": int(patches[rank]),
                "idle_share": simulated.idle_share(rank),
            }
            for rank in range(num_ranks)
        ],
        "idle_share": simulated.mean_idle_share,
        "exchanges": [f"{e.kind} {e.micro_batch}" for e in work.exchanges],
        "suggestions": [
            {
                "vision_ranks": number_tried,
                "relative_seconds": suggested.seconds / simulated.seconds,
                "idle_share": suggested.mean_idle_share,
            }
            for number_tried, suggested in suggestions
        ],
    }


def read_rows(run: RunConfig, number: int) -> list[RowShape]:
    """Return the sizes of the rows of a step of the run's samples.

    Args:
        run: The run; its samples are read.
        number: 0-based number of the step.

    Raises:
        UserError: For samples that cannot be read.
    """
    loader = RowLoader(run.data, run.model, run.training.seed)
    for _ in range(number + 1):
        read = loader.next_rows(run.training.rows_per_step)
    return [shape_of(row, run) for row in read]
