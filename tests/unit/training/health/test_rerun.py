# SPDX-License-Identifier: Apache-2.0
"""Two computations of a step are told apart, and the ranks that differ are named."""

import math
from typing import Any

from megatron_keye.optim.measured import FIGURES, Measured
from megatron_keye.training.health.rerun import compare

HOSTS = ["a", "b", "c"]


def measured(**changes: list[float]) -> Measured:
    """Return figures of three ranks; names have _ for spaces."""
    by_rank: dict[Any, Any] = dict.fromkeys(FIGURES, (1.0, 2.0, 3.0))
    return Measured(by_rank | {name.replace("_", " "): tuple(v) for name, v in changes.items()})


def test_the_same_bits_blame_data_or_state_also_where_they_are_no_numbers() -> None:
    bad = measured(loss=[math.nan, 0.0, math.inf], decoder_norm=[math.nan] * 3)
    comparison = compare(bad, bad, 0.0)
    assert comparison.is_reproducible and comparison.difference == 0.0
    assert "the same to the bit, so that data or state" in comparison.in_words(HOSTS)


def test_rounding_within_the_tolerance_is_no_difference() -> None:
    near = measured(loss=[1.0005, 2.0, 3.0])
    assert compare(measured(), near, 1e-3).is_reproducible
    assert "the same within 0.0005" in compare(measured(), near, 1e-3).in_words(HOSTS)
    assert not compare(measured(), near, 0.0).is_reproducible


def test_the_ranks_whose_own_figures_differ_are_suspect() -> None:
    # The norm is of all ranks together and tells of none.
    other = measured(own_gradients=[1.0, 2.5, 3.0], decoder_norm=[9.0] * 3)
    comparison = compare(measured(), other, 1e-3)
    assert comparison.ranks == [1] and not comparison.is_reproducible
    assert comparison.in_words(HOSTS).endswith("hardware is suspect: rank 1 on b")
    once = measured(loss=[1.0, 2.0, math.nan])
    assert compare(once, measured(), 1e-3).ranks == [2]


def test_a_sum_that_differs_although_its_parts_do_not_blames_what_adds_them() -> None:
    said = compare(measured(), measured(decoder_norm=[9.0] * 3), 1e-3).in_words(HOSTS)
    assert said.endswith("the network between ranks, whose own figures are the same")


def test_what_is_not_finite_is_named_with_its_ranks() -> None:
    healthy = measured(**{kind: [0.0] * 3 for kind in ("weights", "first_moments")})
    healthy = Measured(healthy.by_rank | {"second moments": (0.0,) * 3})
    assert not healthy.sick and math.isfinite(healthy.gradient_norm)
    sick = Measured(
        healthy.by_rank
        | {
            "loss": (0.0, math.nan, 0.0),
            "weights": (0.0, 0.0, 1.0),
            "vision norm": (math.nan,) * 3,
        }
    )
    assert sick.sick == {"loss": [1], "weights": [2], "sum of gradients": [0, 1, 2]}
    assert sick.gradient_norm == math.inf
