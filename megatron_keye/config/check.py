"""The one sentence every refused setting is told in: what was got, what was expected.

Kept apart so that all sections of the configuration speak alike.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from megatron_keye.errors import UserError


def check(holds: bool, name: str, got: object, expected: str) -> None:
    """Raise a UserError that names the setting unless it `holds`.

    Args:
        holds: Whether the value is acceptable.
        name: Dotted name of the setting, as `--set` takes it.
        got: The value that was given.
        expected: What would be acceptable, as the rest of "expected ...".

    Raises:
        UserError: When `holds` is false.
    """
    if not holds:
        raise UserError(f"{name}: got {got!r}, expected {expected}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to try instead of an unknown `name`: near spellings, or all that is known."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
