# SPDX-License-Identifier: Apache-2.0
"""Makes the profile of a run from what its ranks wrote: timelines, metrics and traces."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.observe.timeline import Timeline, covered, read_steps
from megatron_keye.plan.places import role_of
from megatron_keye.profiling.places import PASSES, PLACES
from megatron_keye.profiling.profile import (
    FORMAT,
    Extrapolation,
    ModuleTime,
    Profile,
    RankProfile,
)
from megatron_keye.profiling.rank_step import RankStep, read_rank_step
from megatron_keye.profiling.roofline import roofline_seconds
from megatron_keye.profiling.spread import Spread

_TOP_KERNELS = 40


def build_profile(
    run: RunConfig,
    *,
    step_range: str,
    num_warm_up: int,
    num_timed: int,
    settings: Sequence[str] = (),
    whole: RunConfig | None = None,
) -> Profile:
    """Read a finished run's folder and return its profile.

    Args:
        run: The run; its steps are those that warm up, timed ones, and traced ones.
        step_range: Name of the range of a traced step.
        num_warm_up: Steps that are left out.
        num_timed: Steps after them that are timed.
        settings: What the command changed, to be shown.
        whole: The run with all layers, where this one has fewer.

    Raises:
        UserError: When the folder lacks a timeline, or a trace is damaged.
    """
    steps = read_steps(run.folder)
    timed = [steps[number] for number in range(num_warm_up, num_warm_up + num_timed)]
    traced_numbers = [step for step in run.training.profiler.trace_steps if step - 1 in steps]
    traces = _read_traces(run.folder / "profiler", traced_numbers, step_range)
    metrics = _read_metrics(run.folder / "metrics.jsonl", num_warm_up, num_timed)
    some = next((of_rank[-1] for of_rank in traces.values()), None)
    facts: dict[str, Any] = some.facts if some is not None else {}
    step_seconds = Spread.of([step.seconds for step in timed])
    traced_seconds = [steps[step - 1].seconds for step in traced_numbers]
    ranks = [_rank(run, rank, timed, traces.get(rank, [])) for rank in sorted(timed[-1].spans)]
    has_mfu = all(line["mfu"] is not None for line in metrics)
    return Profile(
        format=FORMAT,
        name=run.name,
        layout=run.parallel.describe(),
        settings=list(settings),
        device=facts.get("device", "not traced"),
        versions={name: facts[name] for name in ("torch", "megatron_core") if name in facts},
        num_warm_up=num_warm_up,
        num_traced=len(traced_numbers),
        step_seconds=step_seconds,
        tokens_per_second=Spread.of([line["tokens_per_second"] for line in metrics]),
        mfu=Spread.of([line["mfu"] for line in metrics]) if has_mfu else None,
        data_wait_seconds=Spread.of([line["data_wait_seconds"] for line in metrics]),
        save_seconds=Spread.of([line["save_seconds"] for line in metrics]),
        traced_ratio=median(traced_seconds) / step_seconds.median if traced_seconds else 1.0,
        documents=facts.get("documents", []),
        ranks=ranks,
        extrapolation=_extrapolate(run, whole, ranks[0].modules) if whole and some else None,
    )


def _read_traces(folder: Path, steps: Sequence[int], step_range: str) -> dict[int, list[RankStep]]:
    """Return the traced steps of each rank that traced any."""
    found: dict[int, list[RankStep]] = {}
    for step in steps:
        for file in sorted((folder / f"step-{step}").glob("rank-*.trace.json.gz")):
            rank = int(file.name[5:10])
            found.setdefault(rank, []).append(read_rank_step(file, step_range))
    return found


def _read_metrics(file: Path, num_warm_up: int, num_timed: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    wanted = range(num_warm_up + 1, num_warm_up + num_timed + 1)
    return [line for line in lines if "step_seconds" in line and line["step"] in wanted]


def _rank(
    run: RunConfig, rank: int, timed: Sequence[Timeline], traced: Sequence[RankStep]
) -> RankProfile:
    names = sorted({span.name for step in timed for span in step.spans[rank]})
    phases: dict[str, Spread] = {
        name: Spread.of([covered(s for s in step.spans[rank] if s.name == name) for step in timed])
        for name in names
    }
    last = traced[-1] if traced else None
    return RankProfile(
        rank=rank,
        role=role_of(run.parallel, rank),
        phases=phases,
        idle=Spread.of([1 - step.busy_seconds(rank) / step.seconds for step in timed]),
        peak_memory_mib=max(step.peak_memory_mib[rank] for step in timed),
        modules=_modules(traced),
        kernels=last.kernels[:_TOP_KERNELS] if last else [],
        exchanges=last.exchanges if last else [],
        exposed_share=last.exposed_seconds / last.seconds if last else 0.0,
        busy_share=last.busy_seconds / last.seconds if last else 0.0,
        memory=last.memory if last else None,
    )


def _modules(traced: Sequence[RankStep]) -> list[ModuleTime]:
    """Return the modules of a rank over its traced steps."""
    present = {module for step in traced for module, _ in step.modules}
    return [_module(name, traced) for name in PLACES if name in present]


def _module(name: str, traced: Sequence[RankStep]) -> ModuleTime:
    of_passes = {
        in_pass: [step.modules.get((name, in_pass), 0.0) for step in traced] for in_pass in PASSES
    }
    totals = [sum(each) for each in zip(*of_passes.values(), strict=True)]
    last = traced[-1]
    works = [work for work in last.facts["works"] if work["module"] == name]
    peak = last.facts["peak_tflops"]
    least = roofline_seconds(works, last.facts["device"], math.nan if peak is None else peak)
    # The last step's work beside its own time: rows differ from step to step.
    roofline = None if not works or math.isnan(least) or not totals[-1] else least / totals[-1]
    flops = sum(sum(work["executed_flops"].values()) for work in works)
    moved = sum(sum(work["moved_bytes"].values()) for work in works)
    return ModuleTime(
        module=name,
        seconds=Spread.of(totals),
        passes={in_pass: median(each) for in_pass, each in of_passes.items() if any(each)},
        share=totals[-1] / last.seconds,
        flops=flops,
        flops_per_second=flops / totals[-1] if totals[-1] else 0.0,
        moved_bytes=moved,
        bytes_per_second=moved / totals[-1] if totals[-1] else 0.0,
        roofline=roofline,
    )


def _extrapolate(run: RunConfig, whole: RunConfig, modules: Sequence[ModuleTime]) -> Extrapolation:
    """Return what the whole model would take, by the first rank's modules."""
    seconds = {module.module: module.seconds.median for module in modules}
    in_layers = [name for name in seconds if name.startswith("decoder.")]
    layer_seconds = sum(seconds[name] for name in in_layers)
    update = seconds.get("optimizer", 0.0)
    return Extrapolation(
        measured_layers=run.model.decoder.num_layers,
        whole_layers=whole.model.decoder.num_layers,
        layer_seconds=layer_seconds,
        update_seconds=update,
        rest_seconds=sum(seconds.values()) - layer_seconds - update,
        weight_ratio=_num_weights(whole) / _num_weights(run),
    )


def _num_weights(run: RunConfig) -> int:
    """Return the weights of a rank of the first stage, vision's included."""
    return sum(part.count for part in [*decoder_parameters(run, 0), *vision_parameters(run)])
