# SPDX-License-Identifier: Apache-2.0
"""Reads single values of a record; every refusal says what was got and what was expected."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_keye.errors import UserError

_LONGEST_SHOWN = 160


def shown(value: object) -> str:
    """Return a value as error messages show it: written out, long ones cut."""
    written = repr(value)
    return written if len(written) <= _LONGEST_SHOWN else f"{written[:_LONGEST_SHOWN]}..."


def is_given(value: object) -> bool:
    """Return whether a key says anything: tables fill absent keys with null or empty values."""
    return value not in (None, "", [], {}, ())


def text(value: Any, name: str) -> str:
    """Return text, or refuse anything else.

    Raises:
        UserError: Naming the key.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: got {shown(value)}, expected text")
    return value


def number(value: Any, name: str, what: str, *, least: float = -math.inf) -> float:
    """Return a finite number of at least `least`.

    Args:
        value: From the record.
        name: Its key.
        what: Description for the message, to follow "expected ".
        least: Smallest value allowed.

    Raises:
        UserError: Naming the key; also for a truth value, text, NaN and infinity.
    """
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or found < least:
        raise UserError(f"{name}: got {shown(value)}, expected {what}")
    return found


def count(value: Any, name: str, what: str) -> int:
    """Return a whole number of at least 1; as `number` otherwise."""
    found = number(value, name, what, least=1)
    if found != int(found):
        raise UserError(f"{name}: got {shown(value)}, expected {what}")
    return int(found)


def one_of[T](
    raw: Mapping[str, Any], keys: Iterable[str], read: Callable[[Any, str], T]
) -> T | None:
    """Return the value that is given under one of several keys of one meaning; None without any.

    Args:
        raw: Part of a record.
        keys: The spellings.
        read: Takes the value and its key and returns what it means.

    Raises:
        UserError: When two of them are given and differ; also what `read` raises.
    """
    found = {key: read(raw[key], repr(key)) for key in keys if raw.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        given = ", ".join(f"{key!r}: {shown(raw[key])}" for key in found)
        raise UserError(f"got {given}, which mean the same and differ, expected one of them")
    return values[0] if values else None
