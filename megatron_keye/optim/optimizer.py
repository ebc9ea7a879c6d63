# SPDX-License-Identifier: Apache-2.0
"""The optimizers of decoder and vision as one: one gradient norm, one clipping, both or neither.

The two are on different grids, so each has its own Megatron optimizer; this combines their norms.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_keye.config.check import check
from megatron_keye.config.megatron import optimizer_config
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.optim.finite import host_marks, sick_marks, updated_state
from megatron_keye.optim.measured import Measured, gather, norm_of
from megatron_keye.optim.overlapped_sum import OverlappedSum
from megatron_keye.optim.parameter_groups import (
    drop_empty_groups,
    group_overrides,
    of_this_rank_alone,
    set_learning_rate,
    set_weight_decay,
)
from megatron_keye.optim.staged_adamw import gradient_of, stage_state
from megatron_keye.parallel.grid import Grid


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step."""

    gradient_norm: float
    """L2 norm over decoder and vision together, before clipping."""
    learning_rate: float
    """Learning rate of the step, before the multipliers of parts."""
    was_applied: bool
    """False if the step was found bad before it changed a weight."""


class JointOptimizer:
    """The optimizers of this rank's decoder stages and vision tower, as far as it has them."""

    def __init__(self, run: RunConfig, model: KeyeModel, grid: Grid) -> None:
        """Build the optimizers. All ranks must call it at the same point.

        Args:
            run: Optimizer settings.
            model: This rank's modules.
            grid: Groups of both grids.

        Raises:
            UserError: For float64 where Megatron takes a fused optimizer.
        """
        check(
            run.training.precision != "fp64" or megatron_optimizer.USING_PYTORCH_OPTIMIZER,
            "training.precision",
            run.training.precision,
            "fp32 or bf16, since the fused optimizers of Transformer Engine and apex, one of "
            "which is installed, have no float64; or train without both",
        )
        self._run, self._model, self._grid = run, model, grid
        self.decoder: MegatronOptimizer | None = None
        self.vision: MegatronOptimizer | None = None
        self._own_norm = torch.zeros((), dtype=torch.float64)
        self._host_thread = ThreadPoolExecutor(1, "look at optimizer state in main memory")
        self._host_marks: Future[Tensor] | None = None
        overlapped = [stage for stage in model.stages if stage.ddp_config.overlap_grad_reduce]
        self._overlapped = OverlappedSum(overlapped)
        self._summed_later = [each for each in model.wrapped() if each not in overlapped]
        if grid.decoder is not None:
            self.decoder = self._build(model.stages, grid.decoder)
        if grid.vision is not None:
            assert model.vision is not None, "a vision rank owns the ViT"
            self.vision = self._build([model.vision], grid.vision)

    def zero_gradients(self) -> None:
        """Clear the gradients of the last step."""
        for optimizer in self._optimizers:
            # In fp32 gradients alias the summing buffer, and the next backward pass would add to
            # it twice.
            optimizer.zero_grad(set_to_none=True)
        self._overlapped.begin_step()
        for module in self._model.wrapped():
            module.zero_grad_buffer()
        if self._run.training.optimizer.offload:
            # It takes seconds, and changes in updates alone: beside the passes.
            state = updated_state(self._optimizers, is_away=True)
            self._host_marks = self._host_thread.submit(host_marks, state)

    def finish_gradients(self, divisor: float) -> None:
        """Reduce gradients over replicas and divide them once.

        Args:
            divisor: Weight of all labels of the global batch (`BatchCounts.divisor`), the same on
                all ranks.
        """
        # Before ranks add up theirs, after which nobody could tell whose was bad.
        own = [
            buffer.grad_data
            for module in self._summed_later
            for buffer in module.buffers + module.expert_parallel_buffers
        ]
        self._overlapped.start_rest()
        own += self._overlapped.own_norms()
        self._own_norm = norm_of(own, torch.cuda.current_device())
        if self._grid.decoder is not None:
            finalize_model_grads(self._model.stages, None, pg_collection=self._grid.decoder)
        if self._model.vision is not None:
            self._model.vision.finish_grad_sync()
        for module in self._model.wrapped():
            module.scale_gradients(1.0 / divisor)

    @torch.no_grad()
    def measure(
        self, losses: Sequence[Tensor], meanwhile: Callable[[], bool] = lambda: False
    ) -> Measured:
        """Return what decides whether this step may change weights. Collective.

        Besides the gradients it looks at all state that the update would read.

        Args:
            losses: This rank's sums of the language loss and of the indexers' KL, scalars.
            meanwhile: Called repeatedly while other ranks still compute gradients, until it
                returns False. It must not communicate.
        """
        device = torch.cuda.current_device()
        for optimizer in self._optimizers:
            optimizer.prepare_grads()
        norms = [
            0.0 if optimizer is None else float(optimizer.get_grad_norm())
            for optimizer in (self.decoder, self.vision)
        ]
        sums = [loss.detach().double() for loss in losses]
        row = [
            torch.tensor(norms, dtype=torch.float64, device=device),
            torch.stack([*sums, self._own_norm]),
            self._sick_marks(device),
        ]
        return gather(
            torch.cat(row),
            rank=self._grid.rank,
            num_ranks=self._grid.parallel.num_ranks,
            meanwhile=meanwhile,
        )

    @torch.no_grad()
    def update(self, learning_rate: float, norm: float) -> None:
        """Clip by the joint norm and update the weights of both parts.

        Args:
            learning_rate: The step's learning rate, before the multipliers of parts.
            norm: L2 norm of all gradients, which are finite.
        """
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, learning_rate)
            self._clip(optimizer, norm)
            optimizer.step_with_ready_grads()
        self._gather_weights()

    @property
    def _optimizers(self) -> list[MegatronOptimizer]:
        return [o for o in (self.decoder, self.vision) if o is not None]

    def _sick_marks(self, device: torch.device | int) -> Tensor:
        """Return for each kind of state 1.0 if a number of this rank is sick: float64 [3]."""
        marks = sick_marks(updated_state(self._optimizers, is_away=False), device)
        if self._host_marks is None:
            return marks
        return torch.maximum(marks, self._host_marks.result().to(device))

    def _build(
        self, modules: list[torch.nn.Module], groups: ProcessGroupCollection
    ) -> MegatronOptimizer:
        with of_this_rank_alone():
            optimizer = get_megatron_optimizer(
                optimizer_config(self._run),
                modules,
                config_overrides=group_overrides(self._run),
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
        assert isinstance(optimizer, ChainedOptimizer), "one for dense weights, one for experts"
        for inner in optimizer.chained_optimizers:
            # Each would otherwise gather all weights, those of the others too.
            inner._defer_param_sync = True
            drop_empty_groups(inner)
            if self._run.training.optimizer.is_staged:
                stage_state(inner, self._run.training.optimizer)
        set_weight_decay(optimizer)
        return optimizer

    def _clip(self, optimizer: MegatronOptimizer, norm: float) -> None:
        """Scale gradients down so that their joint `norm` becomes the limit of the run.

        Megatron's clipping refuses float64.
        """
        limit = self._run.training.optimizer.clip_gradient_norm
        gradients = [g for w in optimizer.get_parameters() if (g := gradient_of(w)) is not None]
        scale = limit / (norm + 1e-6)
        if 0 < scale < 1 and gradients:
            torch._foreach_mul_(gradients, scale)

    def _gather_weights(self) -> None:
        """All-gather updated weights where replicas share the optimizer."""
        if self._run.training.distributes_optimizer:
            for module in self._model.wrapped():
                module.start_param_sync()
