# SPDX-License-Identifier: Apache-2.0
"""Values that the files of several benchmarks have."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.parse_choice import LETTERS

_LETTER = re.compile(r"\s*\(?([A-Z])[).:]\s+")


def field(record: Mapping[str, Any], *keys: str) -> Any:
    """Return what stands under the first of these keys that a record has.

    Raises:
        UserError: When it has none of them.
    """
    for key in keys:
        if key in record:
            return record[key]
    wanted = " or ".join(map(repr, keys))
    raise UserError(f"got keys {sorted(record)}, expected {wanted} too")


def options(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts of a question's options, without the letters before them.

    Raises:
        UserError: For anything but a list of texts.
    """
    found = field(record, key)
    if not isinstance(found, list):
        raise UserError(f"{key!r}: got {shown(found)}, expected a list of texts")
    texts = [text(option, repr(key)) for option in found]
    letters = [match[1] if (match := _LETTER.match(option)) else "" for option in texts]
    # An option may begin like one: "A. Lincoln" among others without letters.
    is_lettered = letters == [chr(ord("A") + place) for place in range(len(texts))]
    return tuple(_LETTER.sub("", option, count=1) if is_lettered else option for option in texts)


def letter_of(answer: Any, texts: Sequence[str]) -> str:
    """Return the letter of the option whose text is the answer, of equal ones the first.

    Raises:
        UserError: When it is none of them.
    """
    if answer not in texts:
        raise UserError(f"'answer': got {shown(answer)}, expected one of {shown(list(texts))}")
    return LETTERS[texts.index(answer)]
