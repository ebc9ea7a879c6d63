# SPDX-License-Identifier: Apache-2.0
"""Groups of weights that share a learning rate and a weight decay.

Megatron marks groups with factors that its own scheduler multiplies in; the rates of a run are set
here instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
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


@contextmanager
def of_this_rank_alone() -> Iterator[None]:
    """Let Megatron group the weights of this rank alone while it builds an optimizer.

    For checkpoints of its own form, which are not used here, it asks all ranks of the job for
    their groups, once for each optimizer: a rank with decoder and vision would ask twice while one
    with vision alone answers once.
    """

    def gather_own(object_list: list[Any], obj: Any, group: Any = None) -> None:
        assert group is None, "Megatron asks all ranks"
        object_list[:] = [obj] * len(object_list)

    gather_from_all = dist.all_gather_object
    dist.all_gather_object = gather_own
    try:
        yield
    finally:
        dist.all_gather_object = gather_from_all


def drop_empty_groups(optimizer: MegatronOptimizer) -> None:
    """Remove groups without weights on this rank, which apex's Adam does not expect.

    Megatron makes each group that any rank has on all ranks, for its own checkpoints.
    """
    if optimizer.optimizer is not None:
        groups = optimizer.optimizer.param_groups
        optimizer.optimizer.param_groups = [group for group in groups if group["params"]]


def _is_of(part: Part) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(part, lambda weight, name: part_of(name) == part)
