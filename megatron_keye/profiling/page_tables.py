# SPDX-License-Identifier: Apache-2.0
"""The tables of a profile's page as HTML."""

from collections.abc import Sequence
from html import escape

from megatron_keye.profiling.charts import bar, legend
from megatron_keye.profiling.memory import StepMemory
from megatron_keye.profiling.profile import ModuleTime, Profile, RankProfile
from megatron_keye.profiling.units import duration, percent, rate, size

_PASSES = {
    "forward": "var(--forward)",
    "backward": "var(--backward)",
    "recomputed": "var(--recomputed)",
}
_WITH_PASSES = ("vision", "projector", "embedding", "decoder", "vocabulary")
"""How the names of modules begin that have a forward and a backward pass."""
_TOP_KERNELS = 15
_BAR_WIDTH = 180


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kinds: str) -> str:
    """Return a table.

    Args:
        head: Titles of its columns.
        rows: HTML of its cells.
        kinds: A letter for each column: n name, c code, # number, b picture.
    """
    classes = {"n": "name", "c": "code", "#": "number", "b": ""}
    of_column = [classes[kind] for kind in kinds]
    titles = "".join(
        f'<th class="{"number" if each == "number" else ""}">{title}</th>'
        for title, each in zip(head, of_column, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(
            f'<td class="{each}">{cell}</td>' for cell, each in zip(row, of_column, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'


def module_table(rank: RankProfile) -> str:
    """Return the modules of a rank, with a bar of their passes."""
    longest = max(module.seconds.median for module in rank.modules)
    has_roofline = any(module.roofline is not None for module in rank.modules)
    head = ["module", "", "time", "range", "share", "FLOP/s", "bytes/s"]
    rows = [_module_row(module, longest) for module in rank.modules]
    if has_roofline:
        head.append("of roofline")
        for row, module in zip(rows, rank.modules, strict=True):
            row.append("" if module.roofline is None else percent(module.roofline))
    kinds = "nb#####" + "#" * has_roofline
    return legend(_PASSES) + table(head, rows, kinds=kinds)


def _module_row(module: ModuleTime, longest: float) -> list[str]:
    parts = [
        (f"{name}: {duration(seconds)}", seconds, _PASSES[name])
        for name, seconds in module.passes.items()
    ]
    spread = module.seconds
    return [
        escape(module.module),
        bar(parts, width=_BAR_WIDTH, whole=longest),
        duration(spread.median),
        f'<span class="quiet">{duration(spread.low)} to {duration(spread.high)}</span>',
        percent(module.share),
        rate(module.flops_per_second, "FLOP/s"),
        rate(module.bytes_per_second, "B/s"),
    ]


def kernel_table(rank: RankProfile) -> str:
    """Return the longest kernels of a rank, and the module that each belongs to."""
    rows = [
        [
            escape(kernel.name[:120]),
            escape(kernel.module),
            kernel.in_pass if kernel.module.startswith(_WITH_PASSES) else "",
            f"{kernel.count:,}",
            duration(kernel.seconds),
        ]
        for kernel in rank.kernels[:_TOP_KERNELS]
    ]
    return table(["name", "module", "pass", "count", "time"], rows, kinds="cnn##")


def exchange_table(rank: RankProfile) -> str:
    """Return the exchanges of a rank by kind and module."""
    rows = [
        [
            escape(each.kind),
            escape(each.module),
            f"{each.count:,}",
            size(each.num_bytes) if each.num_bytes else "",
            duration(each.seconds),
            duration(each.exposed_seconds),
            percent(each.exposed_seconds / each.seconds) if each.seconds else "",
        ]
        for each in rank.exchanges
    ]
    head = ["exchange", "called in", "count", "bytes", "time, with waits", "exposed", ""]
    return table(head, rows, kinds="nn#####")


def phase_table(profile: Profile) -> str:
    """Return the seconds of each kind of span on each rank."""
    names: dict[str, None] = {}
    for rank in profile.ranks:
        names |= dict.fromkeys(rank.phases)
    rows = [
        [
            f'{rank.rank} <span class="quiet">{escape(rank.role)}</span>',
            *(duration(rank.phases[name].median) if name in rank.phases else "" for name in names),
            percent(rank.idle.median),
        ]
        for rank in profile.ranks
    ]
    return table(["rank", *names, "idle"], rows, kinds="n" + "#" * (len(names) + 1))


def kept_table(memory: StepMemory) -> str:
    """Return the kept activations by module."""
    if not memory.kept:
        return ""
    most = max(memory.kept.values())
    rows = [
        [
            escape(module),
            bar([(module, kept, "var(--c0)")], width=_BAR_WIDTH, whole=most),
            size(kept),
        ]
        for module, kept in list(memory.kept.items())[:12]
    ]
    return table(["kept activations, at their peak", "", "bytes"], rows, kinds="nb#")
