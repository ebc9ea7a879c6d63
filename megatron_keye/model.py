# SPDX-License-Identifier: Apache-2.0
"""Builds one rank's part of the model: virtual stages of the decoder, and the vision tower."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.lora import is_adapter
from megatron_keye.config.megatron import (
    data_parallel_config,
    decoder_config,
    vision_config,
    weight_dtype,
)
from megatron_keye.config.parts import Part
from megatron_keye.config.run import RunConfig
from megatron_keye.decoder.initialization import initialize_weights
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.parallel.grid import Grid
from megatron_keye.vision import VisionTower, add_adapters


@dataclass(frozen=True)
class KeyeModel:
    """One rank's part of the model, wrapped for reducing gradients over replicas."""

    stages: list[DistributedDataParallel]
    """Virtual stages of the decoder in pipeline order; empty on a dedicated vision rank."""
    vision: DistributedDataParallel | None
    """ViT and projector; None on a rank that does not encode."""

    def wrapped(self) -> list[DistributedDataParallel]:
        """Return all wrapped modules of this rank."""
        return [*self.stages, *([self.vision] if self.vision is not None else [])]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put all modules of this rank into evaluation mode, until the context ends."""
        for module in self.wrapped():
            module.eval()
        try:
            yield
        finally:
            for module in self.wrapped():
                module.train()


def build_model(
    run: RunConfig,
    grid: Grid,
    device: torch.device,
    *,
    uses_transformer_engine: bool,
    fusions: Fusions = PLAIN,
    learns: bool = True,
) -> KeyeModel:
    """Build this rank's part of the model; initial weights are equal on every grid.

    Args:
        run: The run.
        grid: Process groups of this rank.
        device: Device of the weights.
        uses_transformer_engine: Whether linears are Transformer Engine's.
        fusions: The fused kernels that run.
        learns: Whether anything is trained; otherwise there is no memory for gradients.
    """
    stages = build_decoder(
        run,
        grid,
        device,
        uses_transformer_engine=uses_transformer_engine,
        fusions=fusions,
        learns=learns,
    )
    return KeyeModel(stages=stages, vision=_build_vision(run, grid, device, learns=learns))


def build_decoder(
    run: RunConfig,
    grid: Grid,
    device: torch.device,
    *,
    uses_transformer_engine: bool,
    fusions: Fusions = PLAIN,
    learns: bool = True,
    draws_weights: bool = True,
) -> list[DistributedDataParallel]:
    """Build this rank's virtual stages; none on a dedicated vision rank.

    Args:
        run: The run.
        grid: Process groups of this rank.
        device: Device of the weights.
        uses_transformer_engine: Whether linears are Transformer Engine's.
        fusions: The fused kernels that run.
        learns: As of `build_model`.
        draws_weights: Whether matrices get their initial weights; else whoever calls fills them.
    """
    stages: list[DistributedDataParallel] = []
    if grid.decoder is None:
        return stages
    config = decoder_config(run, on_gpu=device.type == "cuda", fusions=fusions)
    for index in range(run.parallel.decoder.virtual_stages):
        stage = VirtualStage(
            run,
            config,
            grid.decoder,
            index=index,
            uses_transformer_engine=uses_transformer_engine,
            fusions=fusions,
        ).to(device)
        if draws_weights:
            sharded = stage.sharded_state_dict(metadata={"dp_cp_group": grid.decoder.dp_cp})
            initialize_weights(sharded, std=run.model.decoder.init_std, seed=run.training.seed)
        _freeze(stage, run, learns=learns)
        stages.append(wrap(stage, run, config, grid.decoder, may_overlap=True))
    return stages


def part_of(name: str) -> Part:
    """Return the part of the model that a parameter belongs to.

    Args:
        name: Its name in a virtual stage or in the vision tower, wrapped or not.
    """
    if ".indexer." in name:
        return "indexer"
    children: dict[str, Part] = {"encoder": "vision", "projector": "projector"}
    return children.get(name.removeprefix("module.").partition(".")[0], "decoder")


def _build_vision(
    run: RunConfig, grid: Grid, device: torch.device, *, learns: bool
) -> DistributedDataParallel | None:
    if grid.vision is None:
        return None
    with device:
        tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    tower.reset_parameters(run.training.seed)
    add_adapters(tower, run.training.lora, seed=run.training.seed)
    _freeze(tower, run, learns=learns)
    tower = tower.to(dtype=weight_dtype(run))
    return wrap(tower, run, vision_config(run), grid.vision)


def _freeze(module: torch.nn.Module, run: RunConfig, *, learns: bool) -> None:
    """Freeze the parameters that this run does not train, all of them if nothing learns."""
    for name, parameter in module.named_parameters():
        is_trained = run.training.is_trained(part_of(name), is_adapter=is_adapter(name))
        if not (learns and is_trained):
            parameter.requires_grad_(False)


def wrap(
    module: torch.nn.Module,
    run: RunConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    may_overlap: bool = False,
) -> DistributedDataParallel:
    """Wrap a module so that its replicas add up gradients, and share the optimizer if they do.

    Args:
        module: The module, on its device.
        run: Precision and optimizer.
        config: Megatron's configuration of the module.
        groups: Process groups of its grid.
        may_overlap: Whether gradients may be added up while the last backward pass of a step still
            runs, with `optim.overlapped_sum`.
    """
    overlaps = may_overlap and _overlaps(module, run, groups)
    replicas = data_parallel_config(run, overlaps=overlaps)
    # Megatron-Core has one bucket on later stages, which wait for the first one.
    has_buckets = overlaps and groups.pp.rank() == 0
    layout = None
    if replicas.use_distributed_optimizer:
        layout = DistributedOptimizer.compute_full_param_layout(
            [weight for weight in module.parameters() if weight.requires_grad],
            replicas.bucket_size if has_buckets else None,
            groups.dp_cp.size(),
            replicas,
            expert_data_parallel_world_size=groups.expt_dp.size(),
        )
    return DistributedDataParallel(
        config,
        replicas,
        module,
        disable_bucketing=not has_buckets,
        pg_collection=groups,
        full_param_layout=layout,
    )


def _overlaps(module: torch.nn.Module, run: RunConfig, groups: ProcessGroupCollection) -> bool:
    """Return whether replicas add up gradients under the backward pass."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    setting, has_replicas = run.training.optimizer.overlap, groups.dp_cp.size() > 1
    on_gpu = bool(weights) and weights[0].device.type == "cuda"
    return bool(weights) and has_replicas and (setting == "on" or (setting == "auto" and on_gpu))
