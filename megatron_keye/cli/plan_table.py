# SPDX-License-Identifier: Apache-2.0
"""Formats the plan of a run as text, a line for ranks that are alike, and that of a step."""

import textwrap
from collections.abc import Iterable
from typing import Any

_COLUMNS = 80


def describe(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    lines = [*_wrapped(f"{plan['recipe']}: {plan['grid']}"), ""]
    for part in ("total", "decoder", "vision", "projector", "indexer"):
        lines.append(f"  {part:<10}{plan[f'parameters_{part}']:>18,} parameters")
    lines += ["", *_wrapped(f"  layers per stage: {plan['layers_per_stage']}"), ""]
    lines.append(f"  {'ranks':<12}{'role':<20}{'stage':>5}{'parameters':>16}{'GiB':>8}  layers")
    lines += [f"  {ranks:<12}{text}" for ranks, text in _alike(map(_describe, plan["ranks"]))]
    lines += ["", "  decoder ranks count tensor first, then context, data, pipeline", ""]
    fullest = max(plan["ranks"], key=_total)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in fullest["memory"].items())
    lines += _wrapped(
        f"  most memory is expected on rank {fullest['rank']}, in GiB: {parts}; "
        f"together {_total(fullest):.1f}"
    )
    if largest := max(rank["host_memory"] for rank in plan["ranks"]):
        together = sum(rank["host_memory"] for rank in plan["ranks"])
        lines += _wrapped(
            f"  main memory for the optimizer, in GiB: {largest:.1f} a rank at most, all ranks "
            f"together {together:.1f}"
        )
    return "\n".join(lines) + "\n" + describe_step(plan.get("step"))


def describe_step(step: dict[str, Any] | None) -> str:
    """Return the plan of a step as text; "" for None."""
    if step is None:
        return ""
    mean = step["idle_share"]
    lines = ["", f"  step {step['step']}: {step['pictures']} pictures, idle {mean:.1%} on average"]
    works = (
        f"encode {work['patches']:>9,} patches in {work['chunks']:>4} chunks, "
        f"idle {work['idle_share']:>6.1%}"
        for work in step["ranks"]
    )
    lines += [f"  ranks {ranks:<12}{text}" for ranks, text in _alike(works)]
    lines += _wrapped(f"  exchanges in order: {', '.join(step['exchanges']) or 'none'}")
    for tried in step["suggestions"]:
        lines.append(
            f"  with {tried['vision_ranks']:>4} vision ranks: "
            f"{tried['relative_seconds']:.2f}x the step time, idle {tried['idle_share']:.1%}"
        )
    if step["suggestions"]:
        best = step["suggestions"][0]["vision_ranks"]
        lines.append(f"  fewest rank-seconds: parallel.vision.num_ranks={best}, dedicated")
    return "\n".join(lines) + "\n"


def _describe(rank: dict[str, Any]) -> str:
    """Return what a rank has in common with others: all but its number and other coordinates."""
    stage = rank["place"].get("pipeline", "-")
    return (
        f"{rank['role']:<20}{stage:>5}{rank['parameters']:>16,}{_total(rank):>8.1f}  "
        f"{_ranges(rank['layers']) or 'none'}"
    )


def _alike(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return each different text with the numbers of the ranks that have it."""
    found: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        found.setdefault(text, []).append(rank)
    return [(_ranges(ranks), text) for text, ranks in found.items()]


def _ranges(numbers: list[int]) -> str:
    """Format 0, 1, 4, 5 as 0-1, 4-5."""
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _COLUMNS, subsequent_indent="    ", break_on_hyphens=False)


def _total(rank: dict[str, Any]) -> float:
    return float(sum(rank["memory"].values()))
