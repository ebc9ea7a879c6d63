# SPDX-License-Identifier: Apache-2.0
"""The figures of a profile as text, in 80 columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_keye.config import RunConfig
from megatron_keye.profiling.compare import Difference
from megatron_keye.profiling.profile import ModuleTime, Profile
from megatron_keye.profiling.spread import Spread
from megatron_keye.profiling.units import duration, percent, rate, size

if TYPE_CHECKING:
    from megatron_keye.observe.timeline import Timeline

_TOP_MODULES, _TOP_KERNELS = 12, 8


def describe_profile(profile: Profile) -> str:
    """Return the step, the modules that take most, kernels, exchanges and memory of rank 0."""
    mfu = f", MFU {percent(profile.mfu.median)}" if profile.mfu else ""
    lines = [
        f"{profile.name} on {profile.device}: {profile.layout}",
        f"step {spread(profile.step_seconds)}, "
        f"{profile.tokens_per_second.median:,.0f} tokens/s{mfu}; {profile.step_seconds.count} "
        f"timed, {profile.num_traced} traced at {profile.traced_ratio:.2f}x",
    ]
    first = next((rank for rank in profile.ranks if rank.modules), None)
    if first is not None:
        lines += [f"rank {first.rank}, by module:", *_modules(first.modules)]
        lines.append("longest kernels:" if profile.device != "CPU" else "longest operators:")
        lines += [
            f"  {duration(each.seconds):>9} {each.count:>6}x  {each.module:<29} {each.name[:29]}"
            for each in first.kernels[:_TOP_KERNELS]
        ]
        if first.exchanges:
            moved = sum(each.num_bytes for each in first.exchanges)
            lines.append(
                f"exchanges: {size(moved)}, exposed {percent(first.exposed_share)} of the step"
            )
        if first.memory is not None:
            lines.append(f"memory: {size(first.memory.peak)} at most in a traced step")
    whole = profile.extrapolation
    if whole is not None:
        lines.append(
            f"all {whole.whole_layers} layers, from {whole.measured_layers}: "
            f"{duration(whole.whole_seconds)} of work a step, on as many ranks"
        )
    return "\n".join(lines) + "\n"


def _modules(modules: Sequence[ModuleTime]) -> list[str]:
    longest = sorted(modules, key=lambda each: each.seconds.median, reverse=True)
    lines = []
    for each in longest[:_TOP_MODULES]:
        roofline = "" if each.roofline is None else f"{percent(each.roofline)} of peak"
        rates = rate(each.flops_per_second, "FLOP/s")
        lines.append(
            f"  {each.module:<29}{duration(each.seconds.median):>9}{percent(each.share):>8}"
            f"{rates:>15}{roofline:>17}"
        )
    rest = longest[_TOP_MODULES:]
    if rest:
        seconds = sum(each.seconds.median for each in rest)
        share = sum(each.share for each in rest)
        lines.append(f"  {f'{len(rest)} others':<29}{duration(seconds):>9}{percent(share):>8}")
    return lines


def spread(value: Spread) -> str:
    """Return a duration with its range, as "1.2 s (1.1 s to 1.4 s)"."""
    return f"{duration(value.median)} ({duration(value.low)} to {duration(value.high)})"


def describe_differences(differences: Sequence[Difference]) -> str:
    """Return a line for each quantity of two profiles."""
    lines = [f"{'':<31}{'before':>10}{'after':>11}  difference"]
    for each in differences:
        lines.append(
            f"{each.what:<31}{duration(each.before.median):>10}"
            f"{duration(each.after.median):>11}  {each.verdict}"
        )
    lines.append("none: the ranges of the measurements meet")
    return "\n".join(lines) + "\n"


def describe_overlap(steps: Mapping[int, "Timeline"], run: RunConfig) -> str:
    """Return how vision and decoder overlap in each step, and each rank's idle share."""
    lines = [f"{'step':>5}{'seconds':>10}{'vision':>10}{'decoder':>10}{'over the longer':>17}"]
    for number, step in steps.items():
        vision, decoder = step.vision_seconds(), step.decoder_seconds()
        lines.append(
            f"{number + 1:>5}{step.seconds:>10.3f}{vision:>10.3f}{decoder:>10.3f}"
            f"{step.seconds / max(vision, decoder):>16.2f}x"
        )
    lines.append("vision, decoder: busy seconds of the slowest rank, without waits for features")
    lines.append("over the longer: seconds of the step over the longer of these two")
    last = steps[max(steps)]
    num_decoder = run.parallel.decoder.num_ranks
    for rank in sorted(last.spans):
        busy = last.busy_seconds(rank)
        role = "vision" if rank >= num_decoder else "decoder"
        lines.append(
            f"rank {rank:>4}  {role:<8} busy {busy:>8.3f} s, "
            f"idle {1 - busy / last.seconds:>6.1%}, "
            f"peak memory {last.peak_memory_mib[rank]:>9,.0f} MiB"
        )
    return "\n".join(lines) + "\n"
