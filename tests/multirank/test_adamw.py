# SPDX-License-Identifier: Apache-2.0
"""Every optimizer takes the steps of AdamW as it is written down, with the run's rates and decay.

Each weight's update is computed again in float64 from the gradients that the optimizer saw.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import Shard, optimizers_of, shards_of
from megatron_keye.config import OptimizerConfig, RunConfig
from megatron_keye.config.parts import PARTS
from megatron_keye.model import KeyeModel, part_of
from megatron_keye.optim.learning_rate import learning_rate
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.optim.staged_adamw import MASTER
from tests.support.fused_adam import fused_adam
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import build_step, let_go

SETTINGS = OptimizerConfig(
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    schedule="warmup_stable_decay",
    warmup_steps=1,
    decay_steps=7,
    vision_rate_multiplier=0.5,
    projector_rate_multiplier=3.0,
    indexer_rate_multiplier=2.0,
    weight_decay=0.1,
    epsilon=1e-6,
    clip_gradient_norm=0.05,
)
NUM_STEPS = 3


@dataclass
class Written:
    """AdamW on one shard of one weight, in float64.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the decay scaled by the
    learning rate as all implementations have it.
    """

    name: str
    weight: Tensor
    decays: bool
    mean: Any = 0.0
    square: Any = 0.0

    def step(self, number: int, gradient: Tensor, rate: float) -> None:
        beta1, beta2 = SETTINGS.beta1, SETTINGS.beta2
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        self.square = beta2 * self.square + (1 - beta2) * gradient**2
        mean = self.mean / (1 - beta1 ** (number + 1))
        square = self.square / (1 - beta2 ** (number + 1))
        update = mean / (square.sqrt() + SETTINGS.epsilon)
        if self.decays:
            update = update + SETTINGS.weight_decay * self.weight
        rate *= SETTINGS.rate_multiplier(part_of(self.name))
        self.weight = self.weight - rate * update


def _updated(shard: Shard) -> Tensor:
    """Return what the optimizer updates, in float64."""
    kept = shard.kept.get(MASTER)
    values = shard.part_of(shard.weight.detach()) if kept is None else kept.flatten()
    return values.double().clone()


def _shards(joint: JointOptimizer, model: KeyeModel) -> list[tuple[str, Shard]]:
    names = {id(w): n for wrapped in model.wrapped() for n, w in wrapped.named_parameters()}
    each = (shard for part in optimizers_of(joint) for shard in shards_of(part))
    return [(names[id(shard.weight)], shard) for shard in each]


def _deviations(run_json: str, with_fused_adam: bool) -> tuple[dict[str, float], float]:
    """Return each weight's largest deviation after all steps, and the smallest move of any."""
    run = RunConfig.from_json(run_json)
    if with_fused_adam:
        with fused_adam():
            _, model, optimizer, step = build_step(run)
    else:
        _, model, optimizer, step = build_step(run)
    shards = _shards(optimizer, model)
    written = [Written(n, _updated(s), decays=s.weight.dim() >= 2) for n, s in shards]
    before = [each.weight for each in written]
    _compute_beside(optimizer, run, list(zip(shards, written, strict=True)))
    for number in range(NUM_STEPS):
        step(mixed_rows(number), number)
    found: dict[str, float] = {}
    for (name, shard), mine in zip(shards, written, strict=True):
        worst = float((_updated(shard) - mine.weight).abs().max())
        found[name] = max(worst, found.get(name, 0.0))
    moves = [float((a.weight - b).abs().max()) for a, b in zip(written, before, strict=True)]
    let_go(model)
    return found, min(moves)


def _compute_beside(
    optimizer: JointOptimizer, run: RunConfig, pairs: list[tuple[tuple[str, Shard], Written]]
) -> None:
    """Let each of the optimizer's steps also compute the written one."""
    inner, num_done = optimizer.update, 0

    def update(rate: float, norm: float) -> None:
        nonlocal num_done
        gradients = [
            shard.part_of(shard.weight.main_grad).double().clone()  # type: ignore[attr-defined]
            for (_, shard), _ in pairs
        ]
        inner(rate, norm)
        assert norm > SETTINGS.clip_gradient_norm, "nothing is clipped"
        scale = SETTINGS.clip_gradient_norm / (norm + 1e-6)
        assert rate == learning_rate(num_done, run.training.steps, SETTINGS)
        for (_, written), gradient in zip(pairs, gradients, strict=True):
            written.step(num_done, scale * gradient, rate)
        num_done += 1

    optimizer.update = update  # type: ignore[method-assign]


ALONE = {"distributed": False}
# Precision, how state is kept, whether the optimizer is a fused one, and degrees.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], bool, dict[str, int]]] = {
    "torch, fp64": ("fp64", ALONE, False, {}),
    "torch, masters": ("bf16", ALONE, False, {}),
    "torch, shared": ("fp32", {}, False, {"data": 2, "expert": 2}),
    "torch, shared masters, vision alone": ("bf16", {}, False, {"vision_ranks": 1}),
    "fused": ("fp32", ALONE, True, {}),
    "fused, shared masters": ("bf16", {}, True, {"data": 2, "expert": 2}),
    "staged": ("fp32", {"offload": 1.0}, False, {}),
    "staged, made with a fused one": ("bf16", {"offload": 0.5}, True, {"data": 2, "expert": 2}),
}


@pytest.mark.parametrize(
    ("precision", "kept", "with_fused_adam", "degrees"), OPTIMIZERS.values(), ids=OPTIMIZERS
)
def test_three_steps_are_those_of_adamw(
    precision: str, kept: dict[str, Any], with_fused_adam: bool, degrees: dict[str, int]
) -> None:
    optimizer = replace(SETTINGS, **kept)
    training = {"precision": precision, "optimizer": optimizer}
    if precision == "fp64":
        plain = tiny_model()
        experts = replace(plain.decoder.experts, balance_loss_weight=0.0)
        model = replace(plain, decoder=replace(plain.decoder, experts=experts))
    else:
        model = tiny_model()
    run = tiny_run(model=model, training=training, **degrees)
    ranks = run_on_ranks(run.parallel.num_ranks, _deviations, run.to_json(), with_fused_adam)
    limit = 1e-12 if precision == "fp64" else 2e-6
    names: set[str] = set()
    for deviations, smallest_move in ranks:
        assert smallest_move > 100 * limit, "a weight hardly moves, so its update proves nothing"
        names |= deviations.keys()
        assert not {name: by for name, by in deviations.items() if by > limit}
    assert {part_of(name) for name in names} == set(PARTS)


def _decays(run_json: str) -> dict[str, float]:
    """Return the weight decay of each weight, by its name."""
    _, model, optimizer, _ = build_step(RunConfig.from_json(run_json))
    names = {id(w): n for wrapped in model.wrapped() for n, w in wrapped.named_parameters()}
    groups = [group for part in optimizers_of(optimizer) for group in part.param_groups]
    for group in groups:
        # All that Megatron's scheduler would have read, had it not been replaced.
        assert group["max_lr"] == SETTINGS.learning_rate
        assert group["min_lr"] == SETTINGS.min_learning_rate
        assert not group["is_decoupled_lr"]
        assert not {"start_wd", "end_wd", "optimizer"} & group.keys()
    found = {names[id(w)]: group["weight_decay"] for group in groups for w in group["params"]}
    assert found.keys() == set(names.values())
    let_go(model)
    return found


def test_matrices_and_tables_decay_and_norms_and_biases_do_not() -> None:
    # A shared optimizer's groups hold shards, which have no names.
    unshared = replace(SETTINGS, distributed=False)
    (decays,) = run_on_ranks(1, _decays, tiny_run(training={"optimizer": unshared}).to_json())
    without = {name for name, decay in decays.items() if decay == 0}
    assert {decays[name] for name in decays.keys() - without} == {0.1}
    is_vector = ("norm.weight", "norm1.weight", "norm2.weight", ".bias")
    assert without == {name for name in decays if name.endswith(is_vector)}
    some = ("embedding.weight", "output_layer.weight", "mlp.router.weight", "linear_fc1.weight")
    some += ("indexer.k_proj.weight", "patch_embedding.weight", "position_embedding.weight")
    for ending in some:
        assert any(name.endswith(ending) for name in decays.keys() - without), ending


def test_megatron_reads_no_further_factor_of_a_group() -> None:
    read = {"max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "optimizer"}
    assert set(ParamGroupOverride.__annotations__) == read
