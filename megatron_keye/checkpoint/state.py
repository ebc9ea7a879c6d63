"""What a checkpoint of weights and optimizer holds, named so that any grid finds its part.

Every tensor goes under its parameter's name in the whole model. Optimizer moments stand beside
their weights instead of in Megatron's per-optimizer lists, whose shape depends on the grid.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.optimizer import JointOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")

Sharded = dict[str, Any]
"""Local names to ShardedTensors or their factories."""


def weight_state(model: KeyeModel, grid: Grid) -> Sharded:
    """Return the weights of this rank as sharded tensors that share memory with them.

    Args:
        model: What this rank owns.
        grid: Groups of this rank.
    """
    state: Sharded = {}
    for index, chunk in enumerate(model.chunks):
        assert grid.decoder is not None, "chunks stand on decoder ranks"
        part = chunk.module.sharded_state_dict(prefix="decoder.", metadata=_metadata(grid.decoder))
        state |= {f"chunk{index}.{name}": value for name, value in part.items()}
    if model.vision is not None:
        assert grid.vision is not None, "vision stands on vision ranks"
        state |= sharded_state_dict_default(
            model.vision.module,
            "vision.",
            (),
            _metadata(grid.vision),
            tp_group=grid.vision.tp,
        )
    return state


def optimizer_state(optimizer: JointOptimizer, weights: Sharded) -> Sharded:
    """Return moments and fp32 master weights as sharded tensors, making empty moments first.

    Args:
        optimizer: Both optimizers of this rank.
        weights: From `weight_state`.
    """
    names = _names_by_identity(weights)
    state: Sharded = {}
    for inner in _optimizers(optimizer):
        if inner.is_stub_optimizer:
            continue
        inner.init_state_fn(inner.optimizer, inner.config)
        for weight, master in _masters(inner):
            name = names[id(weight)]
            parts = {moment: inner.optimizer.state[master][moment] for moment in _MOMENTS}
            if master is not weight:
                parts["master"] = master
            for kind, tensor in parts.items():
                state[f"{name}.{kind}"] = make_sharded_optimizer_tensor(
                    weights[name], tensor, prefix=f"optimizer.{kind}"
                )
    return state


def set_optimizer_steps(optimizer: JointOptimizer, steps: int) -> None:
    """Tell the optimizers how many updates their moments have seen."""
    for inner in _optimizers(optimizer):
        if inner.is_stub_optimizer:
            continue
        for group in inner.optimizer.param_groups:
            if "step" in group:
                group["step"] = steps
            for parameter in group["params"]:
                if "step" not in group:
                    inner.optimizer.state[parameter]["step"] = torch.tensor(float(steps))


@torch.no_grad()
def copy_loaded(loaded: dict[str, Any], targets: dict[str, Tensor]) -> None:
    """Copy loaded tensors into the tensors that asked for them.

    Args:
        loaded: Tensors by local name.
        targets: What `data_of` gave for the same names before loading.
    """
    for name, target in targets.items():
        if loaded[name] is not target:
            target.copy_(loaded[name])


@torch.no_grad()
def copy_to_masters(optimizer: JointOptimizer) -> None:
    """Bring master weights up to date with weights that were loaded without them."""
    for inner in _optimizers(optimizer):
        if inner.is_stub_optimizer:
            continue
        for weight, master in _masters(inner):
            if master is not weight:
                master.copy_(weight)


def data_of(state: Sharded) -> dict[str, Tensor]:
    """Return the tensors behind sharded tensors, by local name."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {name: value.data for name, value in state.items() if isinstance(value, kinds)}


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {"dp_cp_group": groups.dp_cp}


def _names_by_identity(weights: Sharded) -> dict[int, str]:
    return {id(tensor): name for name, tensor in data_of(weights).items()}


def _optimizers(optimizer: JointOptimizer) -> Iterator[MegatronOptimizer]:
    for joint in (optimizer.decoder, optimizer.vision):
        if isinstance(joint, ChainedOptimizer):
            yield from joint.chained_optimizers
        elif joint is not None:
            yield joint


def _masters(inner: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each weight with the tensor that the optimizer updates for it (in fp32, itself)."""
    if not hasattr(inner, "float16_groups"):
        for parameter in inner.get_parameters():
            yield parameter, parameter
        return
    for weights, masters in zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True):
        yield from zip(weights, masters, strict=True)
    for parameters in inner.fp32_from_fp32_groups:
        for parameter in parameters:
            yield parameter, parameter
