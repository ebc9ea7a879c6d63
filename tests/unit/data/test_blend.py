# SPDX-License-Identifier: Apache-2.0
"""Sources keep their shares at every point, and each sample comes once per epoch."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.config import DataConfig
from megatron_keye.data.blend import Blend, next_source

shares = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6).map(
    lambda weights: [weight / sum(weights) for weight in weights]
)


@given(weights=shares, num_draws=st.integers(1, 400))
def test_shares_hold_within_a_few_samples_at_every_point(
    weights: list[float], num_draws: int
) -> None:
    drawn = [0] * len(weights)
    for total in range(1, num_draws + 1):
        drawn[next_source(weights, drawn)] += 1
        off = [abs(count - weight * total) for count, weight in zip(drawn, weights, strict=True)]
        assert max(off) <= max(1, len(weights) - 1), (drawn, weights)


def test_shares_hold_in_the_long_run() -> None:
    drawn = [0, 0, 0]
    for _ in range(100_000):
        drawn[next_source([0.7, 0.2999, 0.0001], drawn)] += 1
    assert drawn == [70_000, 29_990, 10]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 3),
    shuffles=st.booleans(),
    stop=st.integers(0, 40),
)
def test_a_blend_is_a_function_of_seed_and_counts(
    sizes: list[int], seed: int, shuffles: bool, stop: int
) -> None:
    weights = [1 / len(sizes)] * len(sizes)
    unbroken = Blend(sizes, weights, seed=seed, shuffles=shuffles)
    drawn = [unbroken.draw() for _ in range(60)]
    for source, size in enumerate(sizes):
        mine = [index for number, index in drawn if number == source]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size)), "lost or repeated"
    resumed = Blend(sizes, weights, seed=seed, shuffles=shuffles)
    resumed.num_drawn = [
        sum(number == source for number, _ in drawn[:stop]) for source in range(len(sizes))
    ]
    assert [resumed.draw() for _ in range(60 - stop)] == drawn[stop:]


def test_epochs_and_equal_sources_have_orders_of_their_own() -> None:
    blend = Blend([50, 50], [0.5, 0.5], seed=1, shuffles=True)
    drawn = [blend.draw() for _ in range(200)]
    orders = {
        tuple([index for number, index in drawn if number == source][start : start + 50])
        for source in (0, 1)
        for start in (0, 50)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 1.0)]),
        ("a,b.jsonl", [("a,b.jsonl", 1.0)]),
        ("a=b.jsonl", [("a=b.jsonl", 1.0)]),
        ("a.zarr=3,b.jsonl=1", [("a.zarr", 0.75), ("b.jsonl", 0.25)]),
        ("a.zarr=0.2, b=c.zarr=0.2", [("a.zarr", 0.5), ("b=c.zarr", 0.5)]),
    ],
)
def test_sources_are_read_with_their_weights(
    samples: str, expected: list[tuple[str, float]]
) -> None:
    sources = DataConfig(samples=samples, row_tokens=8).sources
    assert [(source.path, source.weight) for source in sources] == expected


@pytest.mark.parametrize("samples", ["a=1,b", "a=1,b=0", "a=1,b=-2", "a=nan,b=1", "a=inf,b=1"])
def test_blends_without_usable_weights_are_refused(samples: str) -> None:
    with pytest.raises(ValueError, match=r"data.samples: got .* expected a weight above 0"):
        DataConfig(samples=samples, row_tokens=8)


def test_other_settings_are_checked() -> None:
    config = DataConfig(samples="a", row_tokens=8)
    with pytest.raises(ValueError, match="data.packing_window: got 0, expected 1 or more"):
        dataclasses.replace(config, packing_window=0)
    with pytest.raises(ValueError, match="data.on_bad_sample: got 'drop', expected 'refuse' or"):
        dataclasses.replace(config, on_bad_sample="drop")
