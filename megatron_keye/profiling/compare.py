# SPDX-License-Identifier: Apache-2.0
"""What differs between two profiles by more than their noise."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_keye.profiling.places import PLACES
from megatron_keye.profiling.profile import Profile
from megatron_keye.profiling.spread import Spread


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity in two profiles, in seconds."""

    what: str
    """The step, a phase or a module."""
    before: Spread
    after: Spread

    @property
    def is_real(self) -> bool:
        """Whether they differ by more than their noise."""
        return self.before.differs_from(self.after)

    @property
    def verdict(self) -> str:
        """What is to be said of it."""
        if min(self.before.count, self.after.count) < 2:
            return "measured once"
        if not self.is_real:
            return "none"
        if not self.before.median:
            return "new"
        return f"{self.after.median / self.before.median:.2f}x"


def compare(before: Profile, after: Profile) -> list[Difference]:
    """Return the step, the phases and the modules of two profiles, side by side.

    Of ranks the slowest counts: of a phase or module the rank whose median is largest.

    Args:
        before: One profile.
        after: Another one.
    """
    found = [Difference(what="step", before=before.step_seconds, after=after.step_seconds)]
    for prefix, phases in (("phase ", _phases), ("", _modules)):
        first, second = phases(before), phases(after)
        names = [name for name in _order(first, second) if name in first or name in second]
        none = Spread(median=0.0, low=0.0, high=0.0, count=2)
        found += [
            Difference(
                what=prefix + name, before=first.get(name, none), after=second.get(name, none)
            )
            for name in names
        ]
    return found


def _order(first: dict[str, Spread], second: dict[str, Spread]) -> Iterator[str]:
    names = {**first, **second}
    yield from (name for name in PLACES if name in names)
    yield from (name for name in names if name not in PLACES)


def _phases(profile: Profile) -> dict[str, Spread]:
    spreads = [(name, of) for rank in profile.ranks for name, of in rank.phases.items()]
    spreads += [("data wait", profile.data_wait_seconds), ("save", profile.save_seconds)]
    return _slowest(spreads)


def _modules(profile: Profile) -> dict[str, Spread]:
    return _slowest([(m.module, m.seconds) for rank in profile.ranks for m in rank.modules])


def _slowest(spreads: list[tuple[str, Spread]]) -> dict[str, Spread]:
    slowest: dict[str, Spread] = {}
    for name, spread in spreads:
        if name not in slowest or spread.median > slowest[name].median:
            slowest[name] = spread
    return slowest
