"""One step of a run's own samples, estimated: who encodes what, who idles, in which order."""

from typing import Any

from megatron_keye.config import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.estimate import forecast


def summarize_step(run: RunConfig, number: int, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of one step with the expected idle time of each rank, ready for JSON.

    Args:
        run: The run; its samples are read.
        number: 0-based number of the step.
        suggests: Whether other numbers of vision ranks are tried.

    Raises:
        UserError: For samples that cannot be read.
    """
    loader = RowLoader(run.data, run.model, run.training.seed)
    for _ in range(number + 1):
        read = loader.next_rows(run.training.rows_per_step)
    rows = forecast.balance_shapes([forecast.shape_of(row, run) for row in read], run)
    plan, speeds = forecast.plan_balanced(rows, run), forecast.Speeds()
    played = forecast.Forecast(rows, run, speeds).play(plan)
    tried = forecast.try_vision_ranks(rows, run, speeds) if suggests else []
    return {
        "step": number,
        "pictures": sum(len(chunk.pictures) for chunk in plan.chunks),
        "ranks": [
            {
                "chunks": len(plan.chunks_of(rank)),
                "patches": sum(plan.chunks[chunk].num_patches for chunk in plan.chunks_of(rank)),
                "idle_share": played.idle_share(rank),
            }
            for rank in played.spans
        ],
        "idle_share": played.mean_idle_share,
        "exchanges": [f"{e.kind} {e.micro_batch}" for e in plan.exchanges],
        "suggestions": [
            {
                "vision_ranks": number_of_ranks,
                "relative_seconds": step.seconds / played.seconds,
                "idle_share": step.mean_idle_share,
            }
            for number_of_ranks, step in tried
        ],
    }
