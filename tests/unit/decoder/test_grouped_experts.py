# SPDX-License-Identifier: Apache-2.0
"""Stacked experts are shards of their own in checkpoints, which are read into their memory."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_keye.config.lora import LoraConfig
from megatron_keye.config.megatron import decoder_config
from megatron_keye.decoder.grouped_experts import GroupedExperts
from megatron_keye.training.health.sick_tensors import _name
from tests.support.tiny import tiny_run

KEY = "mlp.experts.linear_fc1.weight"
THIRD_OF_FIVE_LAYERS = ((0, 2, 5),)


def second_of_two_ranks() -> ProcessGroupCollection:
    ranks = {
        "ep": SimpleNamespace(rank=lambda: 1, size=lambda: 2),
        "expt_dp": SimpleNamespace(rank=lambda: 3),
    }
    return SimpleNamespace(**ranks)  # type: ignore[return-value]


@pytest.fixture
def experts() -> GroupedExperts:
    config = decoder_config(tiny_run(data=2, expert=2), on_gpu=False)
    lora = LoraConfig(rank=3, targets=("experts",))
    return GroupedExperts(2, config, pg_collection=second_of_two_ranks(), lora=lora)


def test_each_expert_is_a_shard(experts: GroupedExperts) -> None:
    state = experts.sharded_state_dict("mlp.experts.", THIRD_OF_FIVE_LAYERS)
    assert len(state) == 2 * 3 and state[KEY].data is experts.linear_fc1.weight
    for name, whole in (
        ("linear_fc1.weight", (5, 4, 48, 32)),
        ("linear_fc2.lora_a", (5, 4, 3, 24)),
    ):
        shards = state[f"mlp.experts.{name}"].build()
        assert {shard.key for shard in shards} == {f"mlp.experts.experts.{name}"}
        assert {shard.global_shape for shard in shards} == {whole}
        assert {shard.replica_id for shard in shards} == {(0, 0, 3)}
        assert [shard.global_offset for shard in shards] == [(2, 2, 0, 0), (2, 3, 0, 0)]


def test_what_was_read_into_shards_is_the_weight(experts: GroupedExperts) -> None:
    factory = experts.sharded_state_dict("mlp.experts.", THIRD_OF_FIVE_LAYERS)[KEY]
    shards = [shard.data for shard in factory.build()]
    for number, shard in enumerate(shards):
        shard.fill_(number)
    merged = factory.merge_fn(shards)
    assert merged.data_ptr() == experts.linear_fc1.weight.data_ptr(), "no copy was made"
    assert torch.equal(merged, experts.linear_fc1.weight)
    assert merged[0].eq(0).all() and merged[1].eq(1).all()


def test_sick_experts_are_named_with_layer_and_numbers(experts: GroupedExperts) -> None:
    factory = experts.sharded_state_dict("mlp.experts.", THIRD_OF_FIVE_LAYERS)[KEY]
    assert _name(factory) == "mlp.experts.experts.linear_fc1.weight[2, 2-3]"
