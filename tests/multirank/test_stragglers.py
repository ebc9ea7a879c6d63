# SPDX-License-Identifier: Apache-2.0
"""A rank that is made slow is named by the ranks' comparison, and only where it is due."""

import time
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.config.training import LoggingConfig
from tests.support.ranks import run_on_ranks
from tests.support.tiny import SyntheticPatches, mixed_rows, tiny_run
from tests.support.train import build_step, let_go

SLOW_SECONDS = 0.3


class SlowPatches(SyntheticPatches):
    """Patches that rank 1 gets late."""

    def take(self) -> Tensor:
        if dist.get_rank() == 1:
            time.sleep(SLOW_SECONDS)
        return super().take()


def _compared_on_rank(run_json: str) -> Any:
    run = RunConfig.from_json(run_json)
    _, model, _, step = build_step(run, source=SlowPatches())
    found = []
    for number in range(3):
        step._clock.heartbeat.begin_step(number + 1)
        step(mixed_rows(0), number)
        found.append([(s.rank, s.role, s.work, s.seconds, s.is_notable) for s in step.slowness])
    let_go(model)
    return found


def test_a_slow_rank_is_named_every_so_many_steps() -> None:
    run = tiny_run(data=2)
    run = replace(run, training=replace(run.training, logging=LoggingConfig(straggler_steps=2)))
    mine, theirs = run_on_ranks(2, _compared_on_rank, run.to_json())
    assert mine == theirs, "all ranks know"
    first, second, third = mine
    assert not first and not third
    rank, role, work, seconds, is_notable = second[0]
    assert (rank, role, work, is_notable) == (1, "decoder stage 0", "decode", True)
    assert seconds >= SLOW_SECONDS
