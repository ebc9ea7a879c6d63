# SPDX-License-Identifier: Apache-2.0
"""Every process group waits as long for a rank as the group of all ranks, not as torch would."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_keye.config import RunConfig
from megatron_keye.parallel.process import exchange_timeout, group_timeout
from tests.support.ranks import run_on_ranks
from tests.support.tiny import tiny_run
from tests.support.train import build_step, let_go


def _timeouts_on_rank(run_json: str) -> Any:
    grid, model, _, _ = build_step(RunConfig.from_json(run_json))
    groups = set(distributed_c10d._world.pg_map)
    exchanging = {each.group for each in (grid.around, grid.beside) if each is not None}
    held = {*exchanging, *vars(grid.decoder or grid.vision).values()} - {None}
    assert held <= groups | {dist.GroupMember.NON_GROUP_MEMBER}, "torch lists every group"
    cpu = torch.device("cpu")
    timeouts = {
        (group.group_name, tuple(dist.get_process_group_ranks(group))): (
            group._get_backend(cpu).options._timeout
        )
        for group in groups
    }
    let_go(model)
    return timeouts, group_timeout()


@pytest.mark.parametrize(
    "degrees", [{"vision_ranks": 1, "shared_micro_batches": 1}, {"tensor": 2}], ids=str
)
def test_every_group_waits_as_long_as_that_of_all_ranks(degrees: dict[str, int]) -> None:
    run = tiny_run(**degrees)
    for timeouts, of_all in run_on_ranks(2, _timeouts_on_rank, run.to_json()):
        assert len(timeouts) >= 4, "of all ranks, of the transport, and of this rank's grid"
        assert of_all == timedelta(minutes=10), "what the support of tests joins with"
        assert set(timeouts.values()) == {of_all}, timeouts


@pytest.mark.parametrize(
    ("hang_minutes", "expected"),
    [(10.0, timedelta(minutes=40)), (0.5, timedelta(minutes=2)), (0.0, timedelta(days=365))],
)
def test_exchanges_wait_longer_than_the_watchdog_and_for_ever_without_it(
    hang_minutes: float, expected: timedelta
) -> None:
    assert exchange_timeout(hang_minutes) == expected
