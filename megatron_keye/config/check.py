"""The error message of an invalid setting: what was got, what was expected.

One function, so that all sections of the configuration word it alike.
"""

from collections.abc import Iterable
from difflib import get_close_matches

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


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown `name`: the nearest known names, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
