"""Groups of weights that share a learning rate and a weight decay.

Megatron marks groups with factors that its own scheduler multiplies in; the rates of a run are set
here instead.
"""

from typing import cast

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_keye.config.parts import PARTS, Part
from megatron_keye.config.run import RunConfig
from megatron_keye.model import part_of

RATE, DECAY = "lr_mult", "wd_mult"
"""Megatron's names of a group's factors of the learning rate and of the weight decay."""

Overrides = dict[ParamKey, ParamGroupOverride]


def group_overrides(run: RunConfig) -> Overrides:
    """Return the factors of weights that differ from the rest, by a rule that finds them.

    Args:
        run: The rate multiplier of each part.
    """
    vectors = ParamWithNamePredicate("vectors", lambda weight, name: weight.dim() < 2)
    overrides = [(vectors, {DECAY: 0.0})]
    for part in PARTS:
        multiplier = run.training.optimizer.rate_multiplier(part)
        if multiplier != 1.0:
            overrides.append((_is_of(part), {RATE: multiplier}))
    # Megatron's groups have an lr_mult, which its type of overrides leaves out.
    return {
        ParamKey(with_name_predicate=rule): cast(ParamGroupOverride, factors)
        for rule, factors in overrides
    }


def set_weight_decay(optimizer: MegatronOptimizer) -> None:
    """Multiply each group's factor into its weight decay; call it once."""
    for group in optimizer.param_groups:
        group["weight_decay"] *= group[DECAY]


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set each group's learning rate to `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE]


def drop_empty_groups(optimizer: MegatronOptimizer) -> None:
    """Remove groups without weights on this rank, which apex's Adam does not expect.

    Megatron makes each group that any rank has on all ranks, for its own checkpoints.
    """
    if optimizer.optimizer is not None:
        groups = optimizer.optimizer.param_groups
        optimizer.optimizer.param_groups = [group for group in groups if group["params"]]


def _is_of(part: Part) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(part, lambda weight, name: part_of(name) == part)
