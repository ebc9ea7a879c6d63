# SPDX-License-Identifier: Apache-2.0
"""Every number comes once, every order comes, and a large range takes no memory."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.data.permutation import Permutation


@given(size=st.integers(1, 700), key=st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_every_number_comes_once(size: int, key: tuple[int, int]) -> None:
    order = Permutation(size, key)
    assert sorted(order[position] for position in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_orders_of_few_samples_are_equally_likely(size: int) -> None:
    num_keys, num_orders = 4_000, math.factorial(size)
    orders = [Permutation(size, (key, 0)) for key in range(num_keys)]
    counts = Counter(tuple(order[position] for position in range(size)) for order in orders)
    expected = num_keys / num_orders
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    chi_squared += expected * (num_orders - len(counts))
    freedom = num_orders - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_a_large_range_is_shuffled_without_memory() -> None:
    tracemalloc.start()
    order = Permutation(10**9, (1234, 3))
    drawn = np.array([order[position] for position in range(20_000)])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**21
    assert len(set(drawn.tolist())) == len(drawn)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    tenths = np.bincount(drawn // 10**8, minlength=10)
    assert tenths.min() > 1_800 and tenths.max() < 2_200
