# SPDX-License-Identifier: Apache-2.0
"""A killed, stopped or poisoned rank under NCCL ends the job in time and with the right words."""

from pathlib import Path

import pytest
import torch

from tests.support.faults import check_killed, check_poisoned, check_stopped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
BOTH = pytest.mark.parametrize("victim", [0, 1], ids=["decoder rank", "vision rank"])


@BOTH
def test_a_killed_rank_ends_the_job(victim: int, tmp_path: Path) -> None:
    check_killed(victim, tmp_path, "cuda")


@BOTH
def test_a_stopped_rank_ends_the_job_within_the_limit(victim: int, tmp_path: Path) -> None:
    check_stopped(victim, tmp_path, "cuda", limit_seconds=30.0)


@BOTH
def test_a_poisoned_gradient_ends_the_job(victim: int, tmp_path: Path) -> None:
    check_poisoned(victim, tmp_path, "cuda")
