# SPDX-License-Identifier: Apache-2.0
"""Words for what is wrong, with the first few of many names."""

from collections.abc import Mapping, Sequence

_NUM_NAMED = 3
"""Ranks, tensors or samples that a sentence names."""


def first_of(names: Sequence[object]) -> str:
    """Return the first of some names, and how many more there are; "" without any."""
    more = len(names) - _NUM_NAMED
    return ", ".join(map(str, names[:_NUM_NAMED])) + (f" and {more} more" if more > 0 else "")


def not_finite(sick: Mapping[str, Sequence[int]]) -> str:
    """Return what is not finite on which ranks; `sick` as `Measured.sick`, not empty."""
    parts = [f"{what} (rank {first_of(ranks)})" for what, ranks in sick.items()]
    return f"not finite: {', '.join(parts)}"
