# SPDX-License-Identifier: Apache-2.0
"""A model generates on other degrees with the weights that a checkpoint would give it there."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_keye.config import LoraConfig, RolloutConfig
from tests.support.ranks import run_on_ranks
from tests.support.refit import bring
from tests.support.tiny import tiny_run


@pytest.mark.parametrize(
    ("degrees", "rollout", "lora_rank"),
    [
        ({"tensor": 2, "expert": 2}, RolloutConfig(tensor=1, expert=1), 4),
        ({"pipeline": 2}, RolloutConfig(tensor=2, expert=2), 0),
        pytest.param({"context": 2, "expert": 2}, RolloutConfig(), 0, marks=pytest.mark.slow),
    ],
    ids=["tensor 2 to 1, expert 2 to 1", "pipeline 2 to tensor 2", "context 2 to data 2"],
)
def test_weights_are_those_of_a_checkpoint_between_the_grids(
    degrees: dict[str, int], rollout: RolloutConfig, lora_rank: int, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=lora_rank)
    run = replace(tiny_run(training={"lora": lora}, **degrees), rollout=rollout)
    for are_equal, num_bytes, asleep, awake in run_on_ranks(
        2, bring, run.to_json(), str(tmp_path)
    ):
        assert are_equal
        assert asleep == 0, "weights that are no training's have memory while they generate"
        is_shared = "context" in degrees
        assert (num_bytes == 0) == (awake == 0) == is_shared, "equal parts share their memory"
