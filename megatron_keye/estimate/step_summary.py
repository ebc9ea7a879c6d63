"""Summarises one estimated step of a run's own samples: chunks, idle shares, exchanges."""

from typing import Any

from megatron_keye.config import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.estimate import forecast


def summarize_step(run: RunConfig, number: int, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of one step with the expected idle share of each rank, ready for JSON.

    Args:
        run: The run; its samples are read.
        number: 0-based number of the step.
        suggests: Whether to simulate other numbers of vision ranks too.

    Raises:
        UserError: For samples that cannot be read.
    """
    rows = forecast.balance_shapes(read_rows(run, number), run)
    plan, speeds = forecast.plan_balanced(rows, run), forecast.Speeds()
    simulated = forecast.Forecast(rows, run, speeds).play(plan)
    suggestions = forecast.try_vision_ranks(rows, run, speeds) if suggests else []
    return {
        "step": number,
        "pictures": sum(len(chunk.pictures) for chunk in plan.chunks),
        "ranks": [
            {
                "chunks": len(plan.chunks_of(rank)),
                "patches": sum(plan.chunks[chunk].num_patches for chunk in plan.chunks_of(rank)),
                "idle_share": simulated.idle_share(rank),
            }
            for rank in simulated.spans
        ],
        "idle_share": simulated.mean_idle_share,
        "exchanges": [f"{e.kind} {e.micro_batch}" for e in plan.exchanges],
        "suggestions": [
            {
                "vision_ranks": num_ranks,
                "relative_seconds": suggested.seconds / simulated.seconds,
                "idle_share": suggested.mean_idle_share,
            }
            for num_ranks, suggested in suggestions
        ],
    }


def read_rows(run: RunConfig, number: int) -> list[forecast.RowShape]:
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
    return [forecast.shape_of(row, run) for row in read]
