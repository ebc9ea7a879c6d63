# SPDX-License-Identifier: Apache-2.0
"""Runs the whole model in one process, for comparing it with other implementations.

It uses the training modules themselves, on a grid of one rank.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_keye.checkpoint.adapters import MERGE, holds_adapters
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.hf.folder import HfFolder
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout
from megatron_keye.checkpoint.hf.weight_map import weight_mappings
from megatron_keye.checkpoint.hf.weights import as_released, load_released, parameter_of
from megatron_keye.checkpoint.selection import check_whole
from megatron_keye.checkpoint.sharded_load import load_sharded
from megatron_keye.checkpoint.state import copy_loaded, data_of, without_objects
from megatron_keye.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_keye.config.megatron import decoder_config, weight_dtype
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.errors import UserError
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.process import join
from megatron_keye.vision import VisionTower

Precision = Literal["fp32", "fp64"]


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Make this process the only rank of a job, without TF32, until the context ends.

    Args:
        device: Where the model will run.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        join(device, rank=0, num_ranks=1, init_method=f"file://{Path(folder) / 'rendezvous'}")
        try:
            yield
        finally:
            dist.destroy_process_group()


class OneProcessModel:
    """Decoder and vision tower on one rank, with weights from a checkpoint."""

    def __init__(self, model: ModelConfig, device: torch.device, precision: Precision) -> None:
        """Build the modules; their matrices are uninitialized until a checkpoint is loaded.

        Args:
            model: Sizes.
            device: Where the modules are.
            precision: Type of weights and activations.
        """
        self.run = _run(model, precision)
        self.device, self.dtype = device, weight_dtype(self.run)
        self.grid = build_grid(self.run.parallel)
        groups = self.grid.decoder
        assert groups is not None, "the only rank has a decoder"
        on_gpu = device.type == "cuda"
        self.stage = VirtualStage(
            self.run,
            decoder_config(self.run, on_gpu=on_gpu),
            groups,
            index=0,
            uses_transformer_engine=False,
        ).to(device)
        tower = VisionTower(self.run.model.vision, self.run.model.decoder.hidden_size)
        self.tower = tower.to(device=device, dtype=self.dtype)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return all parameters, the stage's below "decoder." and the tower's below "vision."."""
        stage = {f"decoder.{name}": weight for name, weight in self.stage.named_parameters()}
        tower = {f"vision.{name}": weight for name, weight in self.tower.named_parameters()}
        return stage | tower

    def gradients(self, layout: ExpertLayout) -> dict[str, Tensor]:
        """Return the gradient of every tensor of a Hugging Face checkpoint, 0 where there is none.

        Args:
            layout: Expert layout of that checkpoint.
        """
        found = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in self.parameters().items()
        }
        return as_released(found, self.run.model, layout)

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        self.stage.zero_grad(set_to_none=True)
        self.tower.zero_grad(set_to_none=True)

    def load_hf(self, folder: HfFolder) -> None:
        """Fill the weights from a Hugging Face folder."""
        load_released(self.parameters(), folder)

    def load_native(self, folder: Path) -> None:
        """Fill the weights from a sharded checkpoint that training or the converter wrote.

        Args:
            folder: The checkpoint, saved on any grid.

        Raises:
            UserError: When it is incomplete, of a model of other sizes, or has adapters.
        """
        check_whole(folder, checks_sums=True)
        source = NativeFolder(folder)
        self._check_native(source)
        state = _sharded_state(self.stage, self.tower, self.grid)
        copy_loaded(load_sharded(state, source), data_of(state))

    def _check_native(self, folder: NativeFolder) -> None:
        """Compare names and shapes with the model's before weights are read."""
        if holds_adapters(folder.tensors):
            raise UserError(
                f"{folder.path}: got adapters beside the weights, expected weights alone; {MERGE}"
            )
        weights = self.parameters()
        for mapping in weight_mappings(self.run.model, "fused"):
            expected = [*mapping.stacked_shape, *parameter_of(weights, mapping).shape]
            stored = folder.tensors.get(mapping.key)
            if stored is None or list(stored.shape) != expected:
                got = "none" if stored is None else f"shape {list(stored.shape)}"
                raise UserError(
                    f"tensor {mapping.key}: got {got} in {folder.path}, expected shape {expected} "
                    "as in the --hf folder; compare two formats of one model"
                )


def _run(model: ModelConfig, precision: Precision) -> RunConfig:
    """Return a run of one rank whose losses are the language loss and the indexer's alone."""
    decoder: DecoderConfig = dataclasses.replace(
        model.decoder, experts=dataclasses.replace(model.decoder.experts, balance_loss_weight=0.0)
    )
    return RunConfig(
        name="verify",
        model=dataclasses.replace(model, decoder=decoder),
        data=DataConfig(samples="none", row_tokens=2),
        parallel=ParallelConfig(),
        training=TrainingConfig(steps=1, precision=precision),
    )


def _sharded_state(stage: VirtualStage, tower: VisionTower, grid: Grid) -> dict[str, Any]:
    """Return the weights as `checkpoint.state.weight_state` does, which takes wrapped modules."""
    assert grid.decoder is not None and grid.vision is not None, "the only rank has both"
    decoder = stage.sharded_state_dict(
        prefix="decoder.", metadata={"dp_cp_group": grid.decoder.dp_cp}
    )
    vision = sharded_state_dict_default(
        tower, "vision.", (), {"dp_cp_group": grid.vision.dp_cp}, tp_group=grid.vision.tp
    )
    return without_objects({**decoder, **vision})
