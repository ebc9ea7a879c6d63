# SPDX-License-Identifier: Apache-2.0
"""Deviations are found at their index, NaN included."""

import numpy as np
import pytest

from megatron_keye.verify.compare import compare, largest


def test_the_largest_deviation_is_found_with_its_index() -> None:
    ours = {"logits": np.array([[1.0, 2.0], [3.0, 4.5]])}
    (found,) = compare(ours, {"logits": np.array([[1.0, 2.25], [3.0, 4.0]])})
    assert (found.largest, found.where, found.ours, found.theirs) == (0.5, (1, 1), 4.5, 4.0)
    assert str(found) == "logits: largest deviation 5.000e-01 at [1, 1], 4.5 against 4"


def test_layers_are_compared_separately_on_request() -> None:
    ours = {"hidden": np.zeros((3, 2, 2)), "logits": np.zeros((3, 2))}
    theirs = {"hidden": np.zeros((3, 2, 2)), "logits": np.zeros((3, 2))}
    theirs["hidden"][1, 0, 1] = 1
    names = ["hidden[0]", "hidden[1]", "hidden[2]", "logits"]
    found = compare(ours, theirs, by_layer=True)
    assert [deviation.name for deviation in found] == names
    assert largest(found).name == "hidden[1]"
    assert largest(found).where == (0, 1)


@pytest.mark.parametrize(("value", "expected"), [(np.nan, 0.0), (1.0, np.inf)])
def test_nan_deviates_from_everything_but_nan(value: float, expected: float) -> None:
    (found,) = compare({"x": np.array([np.nan])}, {"x": np.array([value])})
    assert found.largest == expected


def test_infinities_of_one_sign_are_equal() -> None:
    (found,) = compare({"x": np.array([np.inf, 1])}, {"x": np.array([np.inf, 1])})
    assert found.largest == 0


def test_a_tolerance_is_relative_to_the_scale_of_an_array() -> None:
    (found,) = compare({"x": np.array([1000.0, 1.0])}, {"x": np.array([1000.0, 1.005])})
    assert found.is_within(1e-5) and not found.is_within(1e-6)


def test_an_array_without_entries_does_not_deviate() -> None:
    (found,) = compare({"x": np.empty((0, 4))}, {"x": np.empty((0, 4))})
    assert (found.largest, found.where) == (0.0, ())


def test_only_shared_arrays_count_and_shapes_must_agree() -> None:
    assert [d.name for d in compare({"a": np.ones(1), "b": np.ones(1)}, {"b": np.ones(1)})] == [
        "b"
    ]
    with pytest.raises(ValueError, match=r"b: got shape \[1\] against \[2\]"):
        compare({"b": np.ones(1)}, {"b": np.ones(2)})
    with pytest.raises(ValueError, match="expected at least one array"):
        compare({"a": np.ones(1)}, {"b": np.ones(1)})
