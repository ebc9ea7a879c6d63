# SPDX-License-Identifier: Apache-2.0
"""Finds the rank that is slower than its peers, from the spans of one step. Without torch.

Ranks of one role (a pipeline stage, or vision) have equal work, as far as the plan can balance it.
Only work is compared, no wait for others: a slow rank makes its peers wait, not work. Exchanges
inside of a pass (tensor, context and expert parallel) make all ranks of such a group equally slow,
and a stage of a single group then names nobody.

Megatron's StragglerDetector is not used: it needs a GPU and a port of its own, ranks all ranks by
the FLOP/s of Megatron's whole step, waits for others included, and knows no vision ranks.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_keye.observe.span import Span, SpanName

_SPANS: tuple[SpanName, ...] = ("decode", "encode", "vision", "forward", "backward")
WORK = ("data_wait", *_SPANS)
"""What is compared: the wait for rows, which each rank makes itself, and spans of work."""
_SLOW_RATIO = 1.5
"""Of a rank's seconds over the median of its peers, from which it is named."""
_NOTABLE_SHARE = 0.05
"""Of the step, which the difference must exceed."""


@dataclass(frozen=True, kw_only=True)
class Slowness:
    """How much the slowest rank of a role lags behind its peers in one kind of work."""

    rank: int
    """The slowest rank."""
    role: str
    """Its role in words."""
    work: str
    """Kind of work."""
    seconds: float
    """Its seconds of that work in the step."""
    median_seconds: float
    """Those of its peers, without it."""
    step_seconds: float
    """The whole step, on the slowest rank."""

    @property
    def ratio(self) -> float:
        """Its seconds over those of its peers."""
        return self.seconds / max(self.median_seconds, 1e-9)

    @property
    def is_notable(self) -> bool:
        """Whether a user should look at that rank."""
        lag = self.seconds - self.median_seconds
        return self.ratio >= _SLOW_RATIO and lag > _NOTABLE_SHARE * self.step_seconds

    def __str__(self) -> str:
        """Return a sentence for the log."""
        return (
            f"rank {self.rank} ({self.role}) is slow: {self.work} took {self.seconds:.3g} s, "
            f"{self.ratio:.1f} times the {self.median_seconds:.3g} s of its peers"
        )


def work_seconds(spans: Iterable[Span], *, data_wait: float) -> list[float]:
    """Return a rank's seconds of each kind of work in a step, in the order of `WORK`.

    Args:
        spans: Of the step.
        data_wait: Seconds for which it waited for its rows.
    """
    seconds = dict.fromkeys(_SPANS, 0.0)
    for span in spans:
        if span.name in seconds:
            seconds[span.name] += span.end - span.start
    return [data_wait, *seconds.values()]


def compare(
    seconds: Sequence[Sequence[float]], roles: Sequence[str], *, step_seconds: float
) -> list[Slowness]:
    """Return the slowest rank in each kind of work, the one furthest behind its peers first.

    Args:
        seconds: `work_seconds` of each rank.
        roles: The role of each rank; ranks of one role are peers. A role of one rank is left out.
        step_seconds: Duration of the step.
    """
    peers: dict[str, list[int]] = defaultdict(list)
    for rank, role in enumerate(roles):
        peers[role].append(rank)
    found: dict[str, Slowness] = {}
    for role, ranks in peers.items():
        for index, work in enumerate(WORK):
            of_work = {rank: seconds[rank][index] for rank in ranks}
            slowest = max(of_work, key=lambda rank: of_work[rank])
            others = [of for rank, of in of_work.items() if rank != slowest]
            if not others or not of_work[slowest]:
                continue
            lagging = Slowness(
                rank=slowest,
                role=role,
                work=work,
                seconds=of_work[slowest],
                median_seconds=median(others),
                step_seconds=step_seconds,
            )
            if work not in found or lagging.ratio > found[work].ratio:
                found[work] = lagging
    return sorted(found.values(), key=lambda slowness: slowness.ratio, reverse=True)
