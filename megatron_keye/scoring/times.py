# SPDX-License-Identifier: Apache-2.0
"""Times in a text: clock times, numbers with units, plain numbers, the ends of the video."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = r"\d+(?:\.\d+)?"
_HOURS = r"\s*(?:hours?|hrs?|h)\b"
_MINUTES = r"\s*(?:minutes?|mins?|m)\b"
_SECONDS = r"\s*(?:seconds?|secs?|s)\b"
_AND = r"\s*,?\s*(?:and\s+)?"
_TIME = re.compile(
    rf"""
    (?P<clock>(?<![\d.:])(?:(?P<clock_hours>\d{{1,3}}):)?(?P<clock_minutes>\d{{1,3}}):
        (?P<clock_seconds>\d{{2}}(?:[.,]\d+)?)(?![\d:]))
    | (?<![\w.])(?P<hours>{_NUMBER}){_HOURS}
        (?:{_AND}(?P<hour_minutes>[0-5]?\d){_MINUTES})?(?:{_AND}(?P<hour_seconds>{_NUMBER}){_SECONDS})?
    | (?<![\w.])(?P<minutes>{_NUMBER}){_MINUTES}
        (?:{_AND}(?P<minute_seconds>[0-5]?\d(?:\.\d+)?){_SECONDS})?
    | (?<![\w.])(?P<seconds>{_NUMBER}){_SECONDS}
    | (?<![\w.])(?P<bare>{_NUMBER})(?![\w%]|\.\d)
    | (?P<start>\bthe\s+(?:very\s+)?(?:start|beginning)\b(?:\s+of\s+the\s+(?:video|clip))?)
    | (?P<end>\bthe\s+(?:very\s+)?end\b(?:\s+of\s+the\s+(?:video|clip))?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BEFORE_UNIT = re.compile(r"^\W+|\W+$")


@dataclass(frozen=True)
class Time:
    """One time in a text."""

    start: int
    """Index of its first character."""
    stop: int
    """Index after its last one."""
    seconds: float
    """The time; of a plain number the number itself."""
    unit_seconds: float = 1.0
    """Seconds of the unit that it is written in."""
    is_bare: bool = False
    """Whether it is a number without a unit."""


def find_times(text: str) -> Iterator[Time]:
    """Yield the times in a text from left to right."""
    for match in _TIME.finditer(text):
        yield _time(match)


def read_time(text: str) -> float | None:
    """Return the seconds of a text that is one time and nothing else; None for any other."""
    stripped = _BEFORE_UNIT.sub("", text)
    match = _TIME.fullmatch(stripped)
    return _time(match).seconds if match is not None else None


def _time(match: re.Match[str]) -> Time:
    start, stop = match.span()

    def number(group: str) -> float:
        return float((match[group] or "0").replace(",", "."))

    if match["clock"]:
        hours, minutes = number("clock_hours"), number("clock_minutes")
        return Time(start, stop, 3600 * hours + 60 * minutes + number("clock_seconds"))
    if match["hours"]:
        rest = 60 * number("hour_minutes") + number("hour_seconds")
        return Time(start, stop, 3600 * number("hours") + rest, 3600.0)
    if match["minutes"]:
        return Time(start, stop, 60 * number("minutes") + number("minute_seconds"), 60.0)
    if match["seconds"]:
        return Time(start, stop, number("seconds"))
    if match["bare"]:
        return Time(start, stop, number("bare"), is_bare=True)
    return Time(start, stop, 0.0 if match["start"] else math.inf)
