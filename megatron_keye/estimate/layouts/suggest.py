# SPDX-License-Identifier: Apache-2.0
"""Suggests layouts of a run on some GPUs: searched in closed form, the best few simulated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_keye.config.run import RunConfig, as_override
from megatron_keye.errors import UserError
from megatron_keye.estimate.forecast import Forecast, Speeds
from megatron_keye.estimate.layouts.choices import usable_bytes
from megatron_keye.estimate.layouts.grids import grids, has_grid, nearest
from megatron_keye.estimate.layouts.search import Layout, find_layouts, smallest_need
from megatron_keye.estimate.prediction.machine import Machine
from megatron_keye.estimate.prediction.mix import RowMix
from megatron_keye.estimate.prediction.step import Predictor
from megatron_keye.estimate.traffic import Links
from megatron_keye.estimate.workload import RowShape, balance_shapes, plan_balanced

_MOST_ROWS = 32
"""Rows of a simulated step: with more, a part of the replicas stands for all."""
_ROWS_TOGETHER = 128
"""Rows of all simulated steps, after which no other is simulated: some seconds."""
_TRIED_FACTORS = (2, 4, 8, 16)
"""Of GPUs, where so many do not hold the run."""
_ADAPTER_RANK = 16
"""Of low-rank adapters, tried in place of weights that learn."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, with the time of its step."""

    layout: Layout
    """Degrees, settings, memory and the closed form's time."""
    seconds: float
    """Of a step; simulated, or else by the closed form."""
    idle_share: float
    """Share of the step in which ranks wait: mean of all ranks if simulated."""
    is_simulated: bool
    """Whether the order of all events was played."""


def suggest_layouts(
    run: RunConfig,
    rows: Sequence[RowShape],
    num_gpus: int,
    machine: Machine,
    *,
    most: int = 12,
    num_simulated: int = 0,
) -> list[Suggestion]:
    """Return the layouts that fit, the fastest first; those that are simulated come before others.

    Args:
        run: Model and settings; degrees, recomputation and chunks are chosen anew.
        rows: Of a step, `training.rows_per_step` of them.
        num_gpus: GPUs, all of which are used.
        machine: What they are.
        most: Layouts to return.
        num_simulated: How many of the fastest are simulated at most; fewer if steps are long.

    Raises:
        UserError: Where the run has no layout of so many ranks, or none that fits.
    """
    if not has_grid(run, num_gpus):
        numbers = " or ".join(map(str, nearest(run, num_gpus))) or "fewer"
        raise UserError(
            f"--gpus: got {num_gpus}, expected a number of ranks with which {run.name} can be "
            f"divided; the nearest are {numbers}"
        )
    labels = run.data.row_tokens // 64
    sizes = [row.sizes._replace(num_labels=row.num_labels or labels) for row in rows]
    predictor = Predictor(RowMix(sizes, run), machine)
    layouts = find_layouts(run, num_gpus, predictor, most)
    if not layouts:
        raise UserError(_too_large(run, num_gpus, machine))
    simulated, num_rows = list[Suggestion](), 0
    while len(simulated) < min(num_simulated, len(layouts)) and num_rows < _ROWS_TOGETHER:
        layout = layouts[len(simulated)]
        few, some = _fewer_replicas(layout.run, rows)
        simulated.append(_simulate(layout, few, some, predictor))
        num_rows += len(some)
    rest = [
        Suggestion(each, each.time.seconds, each.time.idle_share, is_simulated=False)
        for each in layouts[len(simulated) :]
    ]
    simulated.sort(key=lambda suggestion: suggestion.seconds)
    return simulated + rest


def settings_of(run: RunConfig, recipe: RunConfig) -> list[str]:
    """Return the arguments of --set that make a run of the recipe's, as training takes them."""
    differing = run.differing_settings(recipe)
    return [as_override(name, value) for name, (value, _) in differing.items()]


def _simulate(
    layout: Layout, run: RunConfig, rows: Sequence[RowShape], predictor: Predictor
) -> Suggestion:
    """Play the order of a step's events, at the speeds that the closed form gives.

    Args:
        layout: The layout.
        run: That of the layout, or with fewer replicas.
        rows: Its rows.
        predictor: Of the layout's time.
    """
    time, degrees = layout.time, layout.run.parallel.decoder
    # Work at a speed of 1 TFLOP/s, over the time of all ranks that do it.
    unit = Forecast(rows, run, Speeds(vision_tflops=1.0, decoder_tflops=1.0))
    share = len(rows) / layout.run.training.rows_per_step
    of_decoder = time.decoder_seconds * degrees.num_ranks * share
    encoders = layout.run.parallel.vision.num_ranks or degrees.num_ranks
    of_vision = time.vision_seconds * encoders * share
    speeds = Speeds(
        decoder_tflops=unit.decoder_seconds() / of_decoder,
        vision_tflops=unit.vision_seconds() / of_vision if of_vision else 1.0,
        links=Links(
            link_gigabytes_per_second=predictor.machine.between_nodes_gigabytes_per_second
        ),
    )
    balanced = balance_shapes(rows, run)
    step = Forecast(balanced, run, speeds).play(plan_balanced(balanced, run))
    update = time.parts["update"] + time.parts["gradients"]
    seconds = step.seconds + update
    idle = step.mean_idle_share * step.seconds / seconds
    return Suggestion(layout, seconds, idle, is_simulated=True)


def _fewer_replicas(run: RunConfig, rows: Sequence[RowShape]) -> tuple[RunConfig, list[RowShape]]:
    """Return a run with a part of the replicas, and their rows, where there are many."""
    degrees, vision = run.parallel.decoder, run.parallel.vision
    data = degrees.data
    while data % 2 == 0 and len(rows) * data // degrees.data > _MOST_ROWS:
        if vision.num_ranks * data // degrees.data % 2:
            break
        data //= 2
    part = degrees.data // data
    num_rows = len(rows) // part
    stage_ranks = degrees.tensor * degrees.context * data
    # Of two divisors the greatest that they share divides the experts too.
    expert = math.gcd(degrees.expert, stage_ranks)
    parallel = replace(
        run.parallel,
        decoder=replace(degrees, data=data, expert=expert),
        vision=replace(vision, num_ranks=vision.num_ranks // part),
    )
    training = replace(run.training, rows_per_step=num_rows)
    return replace(run, parallel=parallel, training=training), list(rows[:num_rows])


def _too_large(run: RunConfig, num_gpus: int, machine: Machine) -> str:
    """Say that nothing fits, how much is missing, and what would fit."""
    usable = usable_bytes(machine.memory_gibibytes * 2**30)
    need = smallest_need(run, num_gpus)
    if need is None:
        # No grid suits another of its settings, which says so.
        for parallel in grids(run, num_gpus):
            replace(run, parallel=parallel)
    assert need is not None, "a grid that was refused is refused again"
    remedies = []
    for factor in _TRIED_FACTORS:
        more = smallest_need(run, factor * num_gpus)
        if more and more[0] <= usable:
            remedies.append(f"{factor * num_gpus} GPUs")
            break
    if shorter := _shorter_rows(run, num_gpus, usable):
        remedies.append(f"data.row_tokens={shorter}")
    if _fits_with_adapters(run, num_gpus, usable):
        remedies.append(f"low-rank adapters, training.lora.rank={_ADAPTER_RANK}")
    found = ", ".join(remedies) or "GPUs with more memory"
    return (
        f"--gpus: got {num_gpus} of {machine.name}, on which no layout of {run.name} fits: a GPU "
        f"needs {need[0] / 2**30:.1f} GiB at least ({need[1].parallel.describe()}, everything "
        f"recomputed, with any way to keep the optimizer's state), expected at most "
        f"{usable / 2**30:.1f} of its {machine.memory_gibibytes:g}; what would fit: {found}"
    )


def _fits_with_adapters(run: RunConfig, num_gpus: int, usable: float) -> bool:
    """Return whether the run fits where adapters learn in place of weights."""
    if run.training.lora.is_on:
        return False
    lora = replace(run.training.lora, rank=_ADAPTER_RANK)
    try:
        adapted = replace(run, training=replace(run.training, lora=lora))
    except UserError:
        return False
    need = smallest_need(adapted, num_gpus)
    return need is not None and need[0] <= usable


def _shorter_rows(run: RunConfig, num_gpus: int, usable: float) -> int | None:
    tokens = run.data.row_tokens // 2
    while tokens >= 4_096:
        try:
            shorter = replace(run, data=replace(run.data, row_tokens=tokens))
        except UserError:
            return None
        need = smallest_need(shorter, num_gpus)
        if need and need[0] <= usable:
            return tokens
        tokens //= 2
    return None
