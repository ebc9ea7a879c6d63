# SPDX-License-Identifier: Apache-2.0
"""Which settings make no sense for a run that learns from its own answers.

No part of `RunConfig.validate`, since the same run may generate by other settings, as when it is
evaluated.
"""

from megatron_keye.config.check import check
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import NO_EXPERT


def check_run(run: RunConfig) -> None:
    """Check the settings of other sections that learning from answers depends on.

    Raises:
        UserError: Names the setting, its value and what was expected.
    """
    because = f" with post_training.kind = {run.post_training.kind!r}"
    rollout, training = run.rollout, run.training
    is_whole_law = rollout.temperature > 0 and rollout.top_p == 1 and rollout.top_k == 0
    law = (rollout.temperature, rollout.top_p, rollout.top_k)
    expected = f"a temperature above 0, 1 and 0{because}, whose ratios are of the whole law"
    check(is_whole_law, "rollout.temperature, top_p, top_k", law, expected)
    health, data = training.health, run.data
    known: list[tuple[str, object, tuple[object, ...]]] = [
        ("rollout.server", rollout.server, ("",)),
        ("training.epochs", training.epochs, (0.0,)),
        ("training.phase", training.phase, ("dense", "sparse")),
        ("training.dense_up_to", training.dense_up_to, (0,)),
        ("training.health.on_spike", health.on_spike, ("warn", "skip", "stop")),
        ("training.health.after_bad_steps", health.after_bad_steps, ("stop",)),
        ("data.validation", data.validation, ("",)),
        ("data.on_bad_sample", data.on_bad_sample, ("refuse",)),
    ]
    for name, value, values in known:
        check(value in values, name, value, f"{' or '.join(map(repr, values))}{because}")
    if run.post_training.replays_routes:
        _check_replay(run)
    is_one = len(data.sources) == 1
    check(is_one, "data.samples", data.samples, f"one file of questions{because}")


def _check_replay(run: RunConfig) -> None:
    """Check what routing tokens again as generation did depends on."""
    fusion, graphs = run.training.fusions.router, run.rollout.uses_cuda_graphs
    num_experts = run.model.decoder.experts.num_experts
    because = " with post_training.replays_routes"
    known: list[tuple[str, object, bool, str]] = [
        ("training.fusions.router", fusion, fusion != "on", "'auto' or 'off'"),
        ("rollout.uses_cuda_graphs", graphs, not graphs, "False"),
        (
            "model.decoder.experts.num_experts",
            num_experts,
            num_experts <= NO_EXPERT,
            "255 or less",
        ),
    ]
    for name, value, holds, expected in known:
        check(holds, name, value, f"{expected}{because}")
