# SPDX-License-Identifier: Apache-2.0
"""The error message of an invalid setting: what was got, what was expected.

Here once, so that all sections of the configuration word it alike.
"""

import dataclasses
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from megatron_keye.errors import UserError


def check(holds: bool, name: str, got: object, expected: str) -> None:
    """Raise a UserError that names the setting unless it `holds`.

    Args:
        holds: Whether the value is acceptable.
        name: Dotted name of the setting, as in `--set`.
        got: The value of the setting.
        expected: Description of acceptable values, to follow "expected ".

    Raises:
        UserError: When `holds` is false.
    """
    if not holds:
        raise UserError(f"{name}: got {got!r}, expected {expected}")


def check_numbers(
    section: Any, where: str, *, above_zero: str = "", zero_or_more: str = ""
) -> None:
    """Check the types and ranges of all numbers of a section; each must be finite.

    Args:
        section: A dataclass.
        where: Its dotted name.
        above_zero: Names of its fields that must be above 0, separated by spaces.
        zero_or_more: Names of those that may be 0 too. Every int or float is in one of the two.

    Raises:
        UserError: For the first number that is wrong.
    """
    positive, others = above_zero.split(), zero_or_more.split()
    numeric = [f for f in dataclasses.fields(section) if f.type in (int, float)]
    differing = {f.name for f in numeric} ^ {*positive, *others}
    assert not differing, f"{where}: {differing} have a range but are no numbers, or none"
    for field in numeric:
        value, is_whole = getattr(section, field.name), field.type is int
        kinds = (int,) if is_whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if field.name in positive:
            holds, expected = is_number and 0 < value < math.inf, "a number above 0"
        else:
            holds, expected = is_number and 0 <= value < math.inf, "a number of 0 or more"
        if is_whole:
            expected = "1 or more" if field.name in positive else "0 or more"
        check(holds, f"{where}.{field.name}", value, expected)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown `name`: the nearest known names, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
