# SPDX-License-Identifier: Apache-2.0
"""A run generates without pipeline stages and context ranks, on any number of ranks that fits."""

import pytest

from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe
from megatron_keye.rollout.grid import generating_run
from tests.support.tiny import tiny_run


@pytest.mark.parametrize(
    ("num_ranks", "settings", "degrees"),
    [
        (64, [], (2, 8, 32)),
        (8, [], (2, 8, 4)),
        (8, ["rollout.tensor=1"], (1, 8, 8)),
        (2, ["rollout.tensor=1", "rollout.expert=2"], (1, 2, 2)),
    ],
)
def test_stages_and_context_ranks_become_replicas(
    num_ranks: int, settings: list[str], degrees: tuple[int, int, int]
) -> None:
    trained = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True).with_overrides(settings)
    decoder = generating_run(trained, num_ranks).parallel.decoder
    assert (decoder.tensor, decoder.expert, decoder.data) == degrees
    assert (decoder.pipeline, decoder.context, decoder.num_ranks) == (1, 1, num_ranks)


def test_vision_ranks_stay_apart() -> None:
    parallel = generating_run(tiny_run(tensor=2, vision_ranks=1), 5).parallel
    assert (parallel.decoder.data, parallel.vision.num_ranks) == (2, 1)


def test_what_belongs_to_training_is_left_out() -> None:
    run = tiny_run(training={"dense_up_to": 20, "frozen": ("vision",)})
    run = run.with_overrides(["data.feature_cache=cache", "data.on_bad_sample=skip"])
    generating = generating_run(run, 1)
    assert generating.training.dense_up_to == 0
    assert (generating.data.feature_cache, generating.data.on_bad_sample) == ("", "refuse")
    assert generating.model == run.model


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="tensor 2.*expected 3, the number of ranks"):
        generating_run(tiny_run(tensor=2), 3)
    with pytest.raises(UserError, match="parallel.decoder.expert: got 4"):
        generating_run(tiny_run(tensor=2, expert=2).with_overrides(["rollout.expert=4"]), 2)


@pytest.mark.parametrize(
    ("degrees", "training", "message"),
    [
        ({"tensor": 2}, {}, "rollout.tensor: got 2, expected 1 with rollout.uses_cuda_graphs"),
        ({"data": 2, "expert": 2}, {}, "rollout.expert: got 2, expected 1"),
        ({}, {"phase": "dense"}, "training.phase: got 'dense', expected 'sparse'"),
    ],
)
def test_graphs_that_no_gpu_could_capture_are_refused(
    degrees: dict[str, int], training: dict[str, str], message: str
) -> None:
    run = tiny_run(training=training, **degrees)
    graphs = ["rollout.uses_cuda_graphs=true"]
    with pytest.raises(UserError, match=message):
        generating_run(run.with_overrides(graphs), run.parallel.num_ranks)
    generating_run(run, run.parallel.num_ranks)
    generating_run(tiny_run(data=2).with_overrides(graphs), 2)
