# SPDX-License-Identifier: Apache-2.0
"""Reads the stretches of time in an answer, in the many forms in which models write them.

JSON comes first, since its meaning is certain; then pairs of times with a word or a dash between.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.scoring.final_answer import final_answer, split_json
from megatron_keye.scoring.intervals import Interval
from megatron_keye.scoring.times import Time, find_times, read_time

_BOUNDS = (
    *(("start", "end"), ("start_time", "end_time"), ("start_seconds", "end_seconds")),
    *(("begin", "end"), ("from", "to"), ("startTime", "endTime")),
)
_LISTS = (
    *("intervals", "interval", "timestamps", "timestamp", "times", "time", "segments", "segment"),
    *("spans", "span", "windows", "moments", "answer", "answers"),
)
_APPROXIMATELY = r"(?:(?:at|around|about|approximately|roughly|exactly)\s*)*"
_UNTIL = re.compile(
    rf"(?:-+>?|~|\u2013|\u2014|\u2192|(?:up\s*)?to|until|till|through|thru)\s*{_APPROXIMATELY}",
    re.IGNORECASE,
)
_END = re.compile(
    r"[,;.]?\s*(?:and|but)?\s*(?:it\s+|then\s+)?"
    r"(?:end(?:s|ed|ing)?|finish(?:es)?|stops?|lasts|disappears|vanishes|leaves)"
    rf"[\s_]*(?:time)?\s*(?:is|=|:|until|till)?\s*{_APPROXIMATELY}",
    re.IGNORECASE,
)
_AND = re.compile(rf"and\s*{_APPROXIMATELY}", re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween\W+(?:\w+\W+)?$", re.IGNORECASE)
_NEIGHBOURS = 40
"""Characters before or after a time that are looked at."""
_ONWARDS = re.compile(r"on(?:wards?)?\b", re.IGNORECASE)
_MARKS = " \t\r\n<>[](){}\"'*`_"
_NEVER = re.compile(
    r"\b(?:never|none|nothing|nowhere|n/a|no\s+such|(?:not|n't)\s+(?:\w+\s+){0,2}?"
    r"(?:appear|show|shown|occur|happen|present|visible|exist|seen|in\s+the\s+video))",
    re.IGNORECASE,
)


def parse_intervals(text: str) -> list[Interval] | None:
    """Return the stretches of time that an answer names.

    Read are JSON ([12.5, 14], [[1, 2], [5, 6]], {"start": "00:12", "end": "00:14"}) and pairs of
    times: "12.5s - 14s", "00:12 to 00:14", "<12.5 seconds> to <14.0 seconds>", "between 1 min and
    80 s", "starts at 3 and ends at 5", "from 3 s on". Numbers without a unit are seconds; they
    count only where no pair in the answer has a unit.

    Returns:
        In the order of the text, an end that is left open as infinity; none where the answer says
        that nothing happens; None where it cannot be understood, as with a single time, or an end
        before its start.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    values, rest = split_json(answer)
    found = [pairs for value in values if (pairs := _of_json(value)) is not None]
    intervals = [pair for pairs in found for pair in pairs] if found else _of_text(rest)
    if intervals is None or any(not start <= end or math.isinf(start) for start, end in intervals):
        return None
    return intervals


def _of_json(value: Any) -> list[Interval] | None:
    """Return the stretches that a JSON value holds; None if it means something else."""
    if isinstance(value, Mapping):
        for names in _BOUNDS:
            if all(name in value for name in names):
                return _pair(*(value[name] for name in names))
        named = [value[name] for name in _LISTS if name in value]
        if len(named) == 1:
            return _of_text(named[0]) if isinstance(named[0], str) else _of_json(named[0])
        return None
    if not isinstance(value, list):
        return None
    if len(value) == 2 and (pair := _pair(*value)) is not None:
        return pair
    parts = [_of_text(part) if isinstance(part, str) else _of_json(part) for part in value]
    known = [part for part in parts if part is not None]
    return [pair for part in known for pair in part] if len(known) == len(parts) else None


def _pair(start: Any, end: Any) -> list[Interval] | None:
    bounds = [_seconds(start), _seconds(end)]
    if bounds[0] is None or bounds[1] is None:
        return None
    return [(bounds[0], bounds[1])]


def _seconds(value: Any) -> float | None:
    """Return a JSON number or a text that is one time, in seconds."""
    if isinstance(value, str):
        return read_time(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:
        return None


def _of_text(text: str) -> list[Interval] | None:
    """Return the stretches that stand between two times of a text."""
    times = list(find_times(text))
    pairs = list(_pairs(text, times))
    certain = [pair for pair in pairs if not all(time.is_bare for time in pair)]
    if pairs:
        return [_interval(first, second) for first, second in certain or pairs]
    return [] if not times and _NEVER.search(text) else None


def _pairs(text: str, times: list[Time]) -> Iterator[tuple[Time, Time]]:
    place = 0
    while place < len(times):
        first = times[place]
        second = times[place + 1] if place + 1 < len(times) else None
        if second is not None and _joins(text, first, second):
            yield first, second
            place += 2
            continue
        if not first.is_bare and _ONWARDS.match(
            text[first.stop : first.stop + _NEIGHBOURS].lstrip(_MARKS)
        ):
            yield first, Time(first.stop, first.stop, math.inf)
        place += 1


def _joins(text: str, first: Time, second: Time) -> bool:
    """Return whether the second time ends what the first one starts."""
    gap = text[first.stop : second.start]
    words = gap.strip(_MARKS)
    if not words:
        return False
    # No more than is looked at: an answer that repeats itself endlessly has many gaps.
    before = text[max(0, first.start - _NEIGHBOURS) : first.start]
    if gap.strip() == ",":
        return before.rstrip().endswith(("[", "("))
    if _AND.fullmatch(words):
        return bool(_BETWEEN.search(before))
    return bool(_UNTIL.fullmatch(words) or _END.fullmatch(words))


def _interval(first: Time, second: Time) -> Interval:
    """Return a pair in seconds; a number without a unit has that of the other: "1 - 2 min"."""
    start, end = first.seconds, second.seconds
    if first.is_bare and not second.is_bare:
        start *= second.unit_seconds
    elif second.is_bare and not first.is_bare:
        end *= first.unit_seconds
    return start, end
