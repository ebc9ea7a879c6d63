"""Formats the plan of a run as text, a line per rank, and that of a step."""

from typing import Any


def describe(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    lines = [f"{plan['recipe']}: {plan['grid']}", ""]
    for part in ("total", "decoder", "vision", "projector", "indexer"):
        lines.append(f"  {part:<10}{plan[f'parameters_{part}']:>18,} parameters")
    lines += ["", f"  layers per stage: {plan['layers_per_stage']}", ""]
    for rank in plan["ranks"]:
        place = " ".join(f"{axis} {number}" for axis, number in rank["place"].items())
        layers = f"layers {_ranges(rank['layers'])}" if rank["layers"] else "no layers"
        size = f"{_total(rank):>6.1f} GiB"
        lines.append(
            f"  rank {rank['rank']:>4}  {rank['role']:<19} {place:<46} "
            f"{rank['parameters']:>15,} parameters, {size}, {layers}"
        )
    fullest = max(plan["ranks"], key=_total)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in fullest["memory"].items())
    lines += ["", f"  most memory is expected on rank {fullest['rank']}, in GiB: {parts}"]
    return "\n".join(lines) + "\n" + describe_step(plan.get("step"))


def describe_step(step: dict[str, Any] | None) -> str:
    """Return the plan of a step as text; "" for None."""
    if step is None:
        return ""
    mean = step["idle_share"]
    lines = ["", f"  step {step['step']}: {step['pictures']} pictures, idle {mean:.1%} on average"]
    for rank, work in enumerate(step["ranks"]):
        lines.append(
            f"  rank {rank:>4}  encodes {work['patches']:>9,} patches in {work['chunks']:>4} "
            f"chunks, idle {work['idle_share']:>6.1%}"
        )
    lines.append(f"  exchanges in order: {', '.join(step['exchanges']) or 'none'}")
    for tried in step["suggestions"]:
        lines.append(
            f"  with {tried['vision_ranks']:>4} vision ranks: "
            f"{tried['relative_seconds']:.2f}x the step time, idle {tried['idle_share']:.1%}"
        )
    if step["suggestions"]:
        best = step["suggestions"][0]["vision_ranks"]
        lines.append(f"  fewest rank-seconds: parallel.vision.num_ranks={best}, dedicated")
    return "\n".join(lines) + "\n"


def _ranges(layers: list[int]) -> str:
    """Format 0, 1, 4, 5 as 0-1, 4-5."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def _total(rank: dict[str, Any]) -> float:
    return float(sum(rank["memory"].values()))
