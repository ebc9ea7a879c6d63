"""What one step of a run's own samples is expected to come to: who encodes what, who idles."""

from dataclasses import replace
from typing import Any

from megatron_keye.config import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.errors import UserError
from megatron_keye.estimate import forecast


def forecast_step(run: RunConfig, batch: str, *, suggests: bool) -> dict[str, Any]:
    """Return the plan of one step and what it is expected to come to.

    Args:
        run: The run.
        batch: SAMPLES:STEP.
        suggests: Whether other numbers of vision ranks are tried.

    Raises:
        UserError: For a batch that is not SAMPLES:STEP, or samples that cannot be read.
    """
    samples, colon, number = batch.rpartition(":")
    if not colon or not number.isdigit():
        raise UserError(f"--batch: got {batch!r}, expected SAMPLES:STEP with a step from 0")
    data = replace(run.data, samples=samples or run.data.samples)
    loader = RowLoader(data, run.model, run.training.seed)
    for _ in range(int(number) + 1):
        read = loader.next_rows(run.training.rows_per_step)
    rows = forecast.balance_shapes([forecast.shape_of(row, run) for row in read], run)
    plan, speeds = forecast.plan_balanced(rows, run), forecast.Speeds()
    played = forecast.Forecast(rows, run, speeds).play(plan)
    tried = forecast.try_vision_ranks(rows, run, speeds) if suggests else []
    return {
        "step": int(number),
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
