# SPDX-License-Identifier: Apache-2.0
"""Lengths of unions, and of what stands alone."""

from megatron_keye.profiling.intervals import covered, exposed


def test_the_busy_time_counts_overlapping_kernels_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 9), (0, 4), (1, 2), (3, 6), (20, 21)]) == 10


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    assert exposed([(0, 10), (8, 12)], []) == 12
    assert exposed([(0, 10), (8, 12)], [(2, 5), (4, 9), (30, 40)]) == 12 - 7
    assert exposed([], [(0, 10)]) == 0
