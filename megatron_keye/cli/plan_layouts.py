# SPDX-License-Identifier: Apache-2.0
"""The layouts that megatron-keye plan --gpus suggests, as text and for JSON."""

import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_keye.config import RunConfig
from megatron_keye.estimate.layouts.choices import host_gibibytes, usable_bytes
from megatron_keye.estimate.layouts.suggest import Suggestion, settings_of
from megatron_keye.estimate.prediction.machine import Machine

_COLUMNS = 80
_LEGEND = (
    "TP, PP, CP, EP, DP: tensor, pipeline (x virtual stages), context, expert, data. ViT: ranks "
    "of its own, or all. chunk: patches; k where their activations are kept, else they are "
    "encoded again. again: what layers compute again. why: the largest part of the step."
)


def plan_layouts(
    suggestions: Sequence[Suggestion], recipe: RunConfig, machine: Machine
) -> dict[str, Any]:
    """Return everything that is shown, ready for JSON.

    Args:
        suggestions: The layouts, best first.
        recipe: The run as RECIPE and --set give it.
        machine: The GPU.
    """
    return {
        "recipe": recipe.name,
        "gpu": machine.name,
        "gpus": suggestions[0].layout.run.parallel.num_ranks,
        "rows_per_step": recipe.training.rows_per_step,
        "row_tokens": recipe.data.row_tokens,
        "memory_gibibytes": machine.memory_gibibytes,
        "usable_gibibytes": usable_bytes(machine.memory_gibibytes * 2**30) / 2**30,
        "rates": {
            name: {"rate": getattr(machine, name), "source": source}
            for name, source in machine.sources.items()
        },
        "layouts": [_layout(suggestion, recipe) for suggestion in suggestions],
    }


def _layout(suggestion: Suggestion, recipe: RunConfig) -> dict[str, Any]:
    layout = suggestion.layout
    run, time = layout.run, layout.time
    tokens = run.training.rows_per_step * run.data.row_tokens
    return {
        "seconds": suggestion.seconds,
        "tokens_per_second": tokens / suggestion.seconds,
        "idle_share": suggestion.idle_share,
        "is_simulated": suggestion.is_simulated,
        "gibibytes": layout.needed_bytes / 2**30,
        "host_gibibytes": host_gibibytes(run),
        "why": time.reason(1),
        "parts": time.parts,
        "degrees": vars(run.parallel.decoder),
        "vision": vars(run.parallel.vision),
        "recompute": run.training.recompute,
        "moments": run.training.optimizer.moments,
        "offload": run.training.optimizer.offload,
        "settings": settings_of(run, recipe),
    }


def describe_layouts(planned: dict[str, Any], command: Sequence[str]) -> str:
    """Return the layouts as text.

    Args:
        planned: From `plan_layouts`.
        command: RECIPE and --set as they were given, for the command that trains.
    """
    title = (
        f"{planned['recipe']} on {planned['gpus']} {planned['gpu']}: steps of "
        f"{planned['rows_per_step']} rows of {planned['row_tokens']:,} tokens; of "
        f"{planned['memory_gibibytes']:g} GiB a run may need {planned['usable_gibibytes']:.1f}"
    )
    lines = [*_wrapped(title), ""]
    lines.append(
        f" {'step, s':>8} {'idle':>5} {'GiB':>5} {'TP':>2} {'PP':>5} {'CP':>3} {'EP':>3} "
        f"{'DP':>3} {'ViT':>4} {'chunk':>5} {'again':<9} why"
    )
    layouts = planned["layouts"]
    lines += [_line(layout) for layout in layouts]
    lines += ["", *_wrapped(_LEGEND)]
    if any(layout["is_simulated"] for layout in layouts):
        lines += _wrapped("*: every event simulated; others in closed form.")
    lines += [*_rates(planned), *_state(layouts[0])]
    train = ["megatron-keye", "train", *command, "--ranks", str(planned["gpus"])]
    train += [word for setting in layouts[0]["settings"] for word in ("--set", setting)]
    return "\n".join([*lines, "", "the first one:", "", *_command(train)]) + "\n"


def _line(layout: dict[str, Any]) -> str:
    degrees, vision = layout["degrees"], layout["vision"]
    virtual = degrees["virtual_stages"]
    pipeline = f"{degrees['pipeline']}" + (f"x{virtual}" if virtual > 1 else "")
    chunk = f"{vision['chunk_patches'] / 1024:g}K" + "k" * (vision["recompute"] == "off")
    mark = "*" if layout["is_simulated"] else " "
    return (
        f" {layout['seconds']:>7.4g}{mark} {layout['idle_share']:>5.1%} "
        f"{layout['gibibytes']:>5.1f} {degrees['tensor']:>2} {pipeline:>5} "
        f"{degrees['context']:>3} {degrees['expert']:>3} {degrees['data']:>3} "
        f"{vision['num_ranks'] or 'all':>4} {chunk:>5} {layout['recompute']:<9} {layout['why']}"
    )


def _rates(planned: dict[str, Any]) -> list[str]:
    """Return where the rates are from, by kind of source (--json lists each)."""
    counts: Counter[str] = Counter()
    for rate in planned["rates"].values():
        counts[rate["source"].split(":")[0]] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return _wrapped(f"rates of {planned['gpu']}: {kinds} (--json lists each)")


def _state(layout: dict[str, Any]) -> list[str]:
    """Return what is kept otherwise than the recipe has it, since nothing fits else."""
    words = [f"moments in {layout['moments']}"] if layout["moments"] != "fp32" else []
    if layout["offload"]:
        words.append(f"{layout['host_gibibytes']:.0f} GiB a rank of state in main memory")
    return _wrapped(f"the optimizer's state: {', '.join(words)}") if words else []


def _command(words: Sequence[str]) -> list[str]:
    """Return a command in lines that a shell reads as one."""
    lines, line = list[str](), "    " + shlex.join(words[:3])
    for option, value in zip(words[3::2], words[4::2], strict=True):
        word = f" {shlex.join((option, value))}"
        if len(line) + len(word) > _COLUMNS - 2:
            lines.append(f"{line} \\")
            line = "       "
        line += word
    return [*lines, line]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _COLUMNS, subsequent_indent="    ", break_on_hyphens=False)
