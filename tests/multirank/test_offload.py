# SPDX-License-Identifier: Apache-2.0
"""State in main memory trains as state on the device, bit for bit, and so do their checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of
from megatron_keye.config import RunConfig
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import build_step, let_go, train

BATCHES = [mixed_rows(step) for step in range(3)]
UNEVEN = tiny_model(num_layers=3)
"""Half of its weights' elements end inside of a weight."""


def run_of(precision: str = "bf16", **optimizer: object) -> RunConfig:
    run = tiny_run(data=2, expert=2, model=UNEVEN, training={"precision": precision})
    settings = replace(run.training.optimizer, **optimizer)
    return replace(run, training=replace(run.training, optimizer=settings))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_offloading_changes_no_bit(precision: str) -> None:
    plain = train(run_of(precision), BATCHES)
    half = train(run_of(precision, offload=0.5), BATCHES)
    assert not half.changed(plain)
    assert [m.gradient_norm for m in half.metrics] == [m.gradient_norm for m in plain.metrics]


@pytest.mark.slow
def test_moments_in_bf16_change_little_and_offloading_them_nothing(tmp_path: Path) -> None:
    plain = train(run_of(), BATCHES)
    rounded = train(run_of(moments="bf16"), BATCHES, save_to=tmp_path)
    assert not train(run_of(moments="bf16", offload=1.0), BATCHES).changed(rounded)
    assert rounded.changed(plain)
    for mine, theirs in zip(rounded.metrics, plain.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=5e-3)
    _continue_with_float32(tmp_path / "tiny" / "checkpoints" / "step-00000003")


def _continue_with_float32(saved: Path) -> None:
    """A checkpoint of rounded moments continues in any type and place, the same at first."""
    rows = [mixed_rows(3)]
    plain = train(run_of(), rows, load_from=saved)
    assert not train(run_of(offload=1.0), rows, load_from=saved).changed(plain)
    # The update computes in float32 from the same moments, and rounds them behind it.
    assert not train(run_of(moments="bf16"), rows, load_from=saved).changed(plain)


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_where_state_lies(tmp_path: Path) -> None:
    whole = train(run_of(), BATCHES)
    train(run_of(offload=0.7), BATCHES[:2], save_to=tmp_path)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    assert not train(run_of(), BATCHES[2:], load_from=saved).changed(whole)
    assert not train(run_of(offload=1.0), BATCHES[2:], load_from=saved).changed(whole)


def _state_of(run_json: str) -> tuple[int, int, set[torch.dtype], int]:
    """Return a rank's elements of state, those in main memory, types, and divided weights."""
    _, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    seen, away = 0, 0
    dtypes: set[torch.dtype] = set()
    num_divided = 0
    for each in optimizers_of(optimizer):
        for weight, state in each.optimizer.state.items():
            size = sum(tensor.numel() for tensor in state.values())
            seen, away = seen + size, away + size * each.optimizer.is_away(weight)
        for shard in shards_of(each):
            dtypes |= {shard.kept["exp_avg"].dtype, shard.kept["exp_avg_sq"].dtype}
            assert shard.kept.keys() == {"exp_avg", "exp_avg_sq", "master"}
            num_divided += not shard.is_whole
    let_go(model)
    return seen, away, dtypes, num_divided


def test_a_share_is_that_share_of_the_elements() -> None:
    run = run_of(offload=0.5, moments="bf16")
    for seen, away, dtypes, num_divided in run_on_ranks(2, _state_of, run.to_json()):
        assert 0.4 < away / seen < 0.6
        assert dtypes == {torch.bfloat16}
        assert num_divided, "no weight is divided, so checkpoints prove less"
