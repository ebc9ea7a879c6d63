# SPDX-License-Identifier: Apache-2.0
"""One rule chooses the implementation of every operator."""

import logging

import pytest
import torch

from megatron_keye.kernels.implementations import choose_impl, suits_triton

ALL = ("eager", "triton", "cuda")


@pytest.mark.parametrize(
    ("suits", "expected"),
    [
        ({}, "eager"),
        ({"triton": False, "cuda": False}, "eager"),
        ({"triton": True}, "triton"),
        ({"triton": True, "cuda": True}, "cuda"),
        ({"triton": False, "cuda": True}, "cuda"),
    ],
)
def test_the_default_is_the_last_that_suits(suits: dict[str, bool], expected: str) -> None:
    assert choose_impl("operator", None, ALL, **suits) == expected


def test_what_is_asked_for_runs_whether_it_suits_or_not() -> None:
    assert choose_impl("operator", "cuda", ALL, triton=True) == "cuda"
    with pytest.raises(ValueError, match="got impl = 'fast', expected one of eager, triton, cuda"):
        choose_impl("operator", "fast", ALL)


def test_a_default_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="megatron_keye.kernels"):
        for _ in range(3):
            choose_impl("named once", None, ALL, triton=True)
        choose_impl("never named", "eager", ALL)
    assert [record.getMessage() for record in caplog.records] == ["named once runs as triton"]


def test_triton_does_not_suit_a_cpu() -> None:
    assert not suits_triton(torch.zeros(1))
