# SPDX-License-Identifier: Apache-2.0
"""The page of a profile: one HTML file with its pictures, style and numbers in it."""

from collections.abc import Sequence
from html import escape

from megatron_keye.observe import gantt
from megatron_keye.observe.span import Span
from megatron_keye.profiling.charts import legend, stacked_areas, stacked_bars
from megatron_keye.profiling.page_style import STYLE
from megatron_keye.profiling.page_tables import (
    exchange_table,
    kept_table,
    kernel_table,
    module_table,
    phase_table,
)
from megatron_keye.profiling.places import OUTSIDE
from megatron_keye.profiling.profile import Profile, RankProfile
from megatron_keye.profiling.units import duration, percent, size

_GROUPS = {
    "ViT and projector": ("vision.", "projector"),
    "attention": ("decoder.attention.", "decoder.other"),
    "indexer": ("decoder.indexer.",),
    "experts": ("decoder.experts", "decoder.router", "decoder.dispatch"),
    "norms": ("decoder.norms",),
    "vocabulary": ("vocabulary", "embedding"),
    "optimizer": ("optimizer",),
    "transport, data, other": ("transport", "data", "other"),
    "exposed exchanges": (),
    "idle": (),
}
"""What bars of ranks tell apart, by beginnings of modules' names."""
_COLOURS = {name: f"var(--c{index})" for index, name in enumerate(_GROUPS)}
_MEMORY_COLOURS = {
    "weights": "var(--c1)",
    "gradients": "var(--c2)",
    "optimizer state and rest": "var(--c5)",
    "activations": "var(--c0)",
    "working memory": "var(--c3)",
    "backward pass": "var(--c6)",
    "optimizer": "var(--c8)",
}


def draw_page(profile: Profile, spans: dict[int, list[Span]]) -> str:
    """Return the page's HTML.

    Args:
        profile: What it shows.
        spans: The last timed step, by rank.
    """
    traced = [rank for rank in profile.ranks if rank.modules]
    sections = [_head(profile), _timeline(spans), _phases(profile)]
    if traced:
        sections += [_groups(profile, traced), _of_ranks(profile, traced)]
    sections.append(_method(profile))
    title = escape(f"{profile.name}: where its steps go")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _head(profile: Profile) -> str:
    step = profile.step_seconds
    tiles = [
        (duration(step.median), f"a step; {duration(step.low)} to {duration(step.high)}"),
        (f"{profile.tokens_per_second.median:,.0f}", "tokens a second"),
        (percent(max(rank.idle.median for rank in profile.ranks)), "idle, on the idlest rank"),
    ]
    if profile.mfu:
        tiles.insert(2, (percent(profile.mfu.median), "MFU"))
    traced = [rank for rank in profile.ranks if rank.memory is not None]
    if traced:
        worst = max(rank.exposed_share for rank in traced)
        tiles.append((percent(worst), "exposed exchanges, at most"))
        peak = max(rank.memory.peak for rank in traced if rank.memory is not None)
        tiles.append((size(peak), "memory of tensors, at most"))
    shown = "".join(f'<div class="tile"><b>{b}</b><span>{t}</span></div>' for b, t in tiles)
    settings = ", ".join(profile.settings)
    changed = f"<p>With {escape(settings)}.</p>" if settings else ""
    return (
        f"<h1>{escape(profile.name)} on {escape(profile.device)}</h1>"
        f'<p>{escape(profile.layout)}</p>{changed}<div class="tiles">{shown}</div>'
        + _extrapolation(profile)
    )


def _extrapolation(profile: Profile) -> str:
    whole = profile.extrapolation
    if whole is None:
        return ""
    ratio = whole.whole_layers / whole.measured_layers
    return (
        f"<p><b>{duration(whole.whole_seconds)}</b> of work would be a step of all "
        f"{whole.whole_layers} layers on as many ranks, computed from the "
        f"{whole.measured_layers} that ran: modules of layers, {duration(whole.layer_seconds)}, "
        f"times {ratio:.3g}; the optimizer, {duration(whole.update_seconds)}, times the ratio of "
        f"weights, {whole.weight_ratio:.3g}; everything else, {duration(whole.rest_seconds)}, "
        "once. Pipeline stages, other exchanges and idle time are not in it.</p>"
    )


def _timeline(spans: dict[int, list[Span]]) -> str:
    return (
        "<h2>The last timed step on all ranks</h2><p>Without the traces' cost. Hover over a bar "
        "for its chunk or micro-batch.</p>"
        f'<div class="timeline">{gantt.draw(spans, "")}</div>'
    )


def _phases(profile: Profile) -> str:
    waits = f" Between steps, a rank waits {duration(profile.data_wait_seconds.median)} for rows"
    if profile.save_seconds.high:
        waits += f", and up to {duration(profile.save_seconds.high)} for checkpoints"
    return (
        "<h2>Phases, ranks side by side</h2><p>Seconds of each kind of span, medians over "
        f"{profile.step_seconds.count} timed steps; spans of one rank may lie inside each "
        f"other.{waits}.</p>{phase_table(profile)}"
    )


def _groups(profile: Profile, traced: Sequence[RankProfile]) -> str:
    rows = {f"rank {rank.rank}": _shares(rank) for rank in traced}
    return (
        "<h2>What the ranks do in a step</h2><p>Shares of the last traced step. Exposed "
        "exchanges: messages, with the wait for others, while a rank computes nothing. Idle: "
        "neither.</p>"
        f"{legend(_COLOURS)}{stacked_bars(rows, _COLOURS)}"
    )


def _shares(rank: RankProfile) -> list[tuple[str, float]]:
    shares = [
        (name, sum(m.share for m in rank.modules if begins and m.module.startswith(begins)))
        for name, begins in _GROUPS.items()
        if begins
    ]
    idle = max(0.0, 1 - rank.busy_share - rank.exposed_share)
    return [*shares, ("exposed exchanges", rank.exposed_share), ("idle", idle)]


def _of_ranks(profile: Profile, traced: Sequence[RankProfile]) -> str:
    """Return the details of the first rank of each role, and of others folded."""
    roles: dict[str, RankProfile] = {}
    for rank in traced:
        roles.setdefault(rank.role.split(" ")[0], rank)
    shown = [_of_rank(profile, rank) for rank in roles.values()]
    rest = [rank for rank in traced if rank not in roles.values()]
    folded = [
        f"<details><summary>rank {rank.rank}: {escape(rank.role)}</summary>"
        f"{_of_rank(profile, rank)}</details>"
        for rank in rest
    ]
    return "".join([*shown, *folded])


def _of_rank(profile: Profile, rank: RankProfile) -> str:
    where = f"rank {rank.rank}, {escape(rank.role)}" if rank.role else f"rank {rank.rank}"
    what = "kernels" if profile.device != "CPU" else "operators"
    parts = [
        f"<h2>Modules of {where}</h2>",
        "<p>Times are medians of the traced steps, shares and rates of the last one. Rates are "
        "the account's executed FLOPs and least bytes over the measured time."
        + (" A CPU has no roofline here." if profile.device == "CPU" else "")
        + "</p>",
        module_table(rank),
        f"<h2>Longest {what} of rank {rank.rank}</h2>",
        kernel_table(rank),
    ]
    if rank.exchanges:
        parts += [f"<h2>Exchanges of rank {rank.rank}</h2>", exchange_table(rank)]
    if rank.memory is not None:
        parts.append(_memory(rank, profile.device))
    return "".join(parts)


def _memory(rank: RankProfile, device: str) -> str:
    memory = rank.memory
    assert memory is not None, "only ranks that were traced have it"
    count = len(memory.seconds)
    layers = {kind: [float(held)] * count for kind, held in memory.held.items()}
    layers |= {kind: list(map(float, values)) for kind, values in memory.kinds.items()}
    colours = {name: _MEMORY_COLOURS[name] for name in layers}
    missing = (
        " Of a CPU's main memory the optimizer's state and what libraries hold are not known."
        if device == "CPU"
        else ""
    )
    return (
        f"<h2>Memory of rank {rank.rank} over a step</h2><p>Activations are kept from the forward "
        "for the backward pass; working memory is given back by the pass that took it."
        f"{missing}</p>{legend(colours)}{stacked_areas(memory.seconds, layers, colours)}"
        f"{kept_table(memory)}"
    )


def _method(profile: Profile) -> str:
    versions = ", ".join(f"{name} {of}" for name, of in profile.versions.items())
    outside = "; ".join(f"{name}: {escape(meaning)}" for name, meaning in OUTSIDE.items())
    rows = "; ".join(
        f"{len(row)} documents of {min(row):,} to {max(row):,} tokens"
        for row in profile.documents[:4]
    )
    return (
        f"<h2>How this was measured</h2><p>{profile.num_warm_up} steps to warm up, "
        f"{profile.step_seconds.count} timed, {profile.num_traced} traced by torch's profiler, "
        f"which took {profile.traced_ratio:.2f} times as long. Rows of the last one: "
        f"{rows or 'none'}. {escape(versions)}.</p>"
        f"<p>Beside the account's modules: {outside}.</p>"
    )
