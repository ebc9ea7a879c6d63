"""The optimizers of decoder and vision as one: one gradient norm, one clipping, both or neither.

The two are on different grids, so each has its own Megatron optimizer; this combines their norms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_keye.config.check import check
from megatron_keye.config.megatron import optimizer_config
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.optim.parameter_groups import (
    drop_empty_groups,
    group_overrides,
    set_learning_rate,
    set_weight_decay,
)
from megatron_keye.parallel.grid import Grid


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step."""

    gradient_norm: float
    """L2 norm over decoder and vision together, before clipping."""
    learning_rate: float
    """Learning rate of the step, before the multipliers of parts."""
    was_applied: bool
    """False if a gradient was infinite or NaN; no weight changed then."""


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
        if grid.decoder is not None:
            self.decoder = self._build(model.stages, grid.decoder)
        if grid.vision is not None:
            assert model.vision is not None, "a vision rank owns the ViT"
            self.vision = self._build([model.vision], grid.vision)

    def zero_gradients(self) -> None:
        """Clear the gradients of the last step."""
        for optimizer in (self.decoder, self.vision):
            if optimizer is not None:
                # In fp32 gradients alias the summing buffer, and the next backward pass would
                # add to it twice.
                optimizer.zero_grad(set_to_none=True)
        for module in self._model.wrapped():
            module.zero_grad_buffer()

    def finish_gradients(self, divisor: float) -> None:
        """Reduce gradients over replicas and divide them once.

        Args:
            divisor: Weight of all labels of the global batch (`BatchCounts.divisor`), the same on
                all ranks.
        """
        if self._grid.decoder is not None:
            finalize_model_grads(self._model.stages, None, pg_collection=self._grid.decoder)
        if self._model.vision is not None:
            self._model.vision.finish_grad_sync()
        for module in self._model.wrapped():
            module.scale_gradients(1.0 / divisor)

    @torch.no_grad()
    def step(
        self, learning_rate: float, meanwhile: Callable[[], bool] = lambda: False
    ) -> StepOutcome:
        """Clip by the joint norm and update the weights of both parts, or of none.

        Args:
            learning_rate: The step's learning rate, before the multipliers of parts.
            meanwhile: Called repeatedly while other ranks still compute gradients, until it
                returns False. It must not communicate.
        """
        optimizers = [o for o in (self.decoder, self.vision) if o is not None]
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.prepare_grads()
        norm = self._joint_norm(meanwhile)
        if not math.isfinite(norm):
            return StepOutcome(norm, learning_rate, was_applied=False)
        for optimizer in optimizers:
            self._clip(optimizer, norm)
            optimizer.step_with_ready_grads()
        self._gather_weights()
        return StepOutcome(norm, learning_rate, was_applied=True)

    def _build(
        self, modules: list[torch.nn.Module], groups: ProcessGroupCollection
    ) -> MegatronOptimizer:
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
        set_weight_decay(optimizer)
        return optimizer

    def _clip(self, optimizer: MegatronOptimizer, norm: float) -> None:
        """Scale gradients down so that their joint `norm` becomes the limit of the run.

        Megatron's clipping refuses float64.
        """
        limit = self._run.training.optimizer.clip_gradient_norm
        gradients = [w.grad for w in optimizer.get_parameters() if w.grad is not None]
        scale = limit / (norm + 1e-6)
        if 0 < scale < 1 and gradients:
            torch._foreach_mul_(gradients, scale)

    def _gather_weights(self) -> None:
        """All-gather updated weights where replicas share the optimizer."""
        if self._run.training.distributes_optimizer:
            for module in self._model.wrapped():
                module.start_param_sync()

    def _joint_norm(self, meanwhile: Callable[[], bool]) -> float:
        """Combine the norms of both grids; all ranks of a grid have the same one."""
        squares = [
            0.0 if optimizer is None else float(optimizer.get_grad_norm()) ** 2
            for optimizer in (self.decoder, self.vision)
        ]
        device = torch.cuda.current_device()
        both = torch.tensor(squares, dtype=torch.float64, device=device)
        # A maximum need not propagate NaN, so it becomes infinity.
        both = both.nan_to_num(nan=math.inf, posinf=math.inf)
        work = dist.all_reduce(both, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None, "every rank is in the default group"
        while not work.is_completed() and meanwhile():
            pass
        work.wait()
        return float(both.sum().sqrt())
