"""Both optimizers of a rank, stepping as one: one gradient norm, one clip, all or none.

Decoder and vision live on different grids, so each has a Megatron optimizer of its own; their
norms are combined here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_keye.config.megatron import optimizer_config
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step."""

    gradient_norm: float
    """Norm over decoder and vision together, before clipping."""
    learning_rate: float
    """With which weights changed, if they did."""
    was_applied: bool
    """False when a gradient was infinite or not a number; no weight changed then."""


class JointOptimizer:
    """The optimizers of the decoder's part and of the vision part that this rank owns."""

    def __init__(self, run: RunConfig, model: KeyeModel, grid: Grid) -> None:
        """Build the optimizers. All ranks must call it at the same point.

        Args:
            run: Optimizer settings.
            model: What this rank owns.
            grid: Groups of both grids.
        """
        self._run, self._model, self._grid = run, model, grid
        self.decoder: MegatronOptimizer | None = None
        self.vision: MegatronOptimizer | None = None
        if grid.decoder is not None:
            self.decoder = self._build(model.stages, grid.decoder)
        if grid.vision is not None:
            assert model.vision is not None, "a vision rank owns the ViT"
            self.vision = self._build([model.vision], grid.vision)

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for optimizer in (self.decoder, self.vision):
            if optimizer is not None:
                # In fp32 each gradient still lies in the summing buffer, where the next backward
                # pass would add to it twice.
                optimizer.zero_grad(set_to_none=True)
        for module in self._model.wrapped():
            module.zero_grad_buffer()

    def finish_gradients(self, divisor: int) -> None:
        """Add up gradients over replicas and divide them once.

        Args:
            divisor: Tokens of the whole global batch that have a loss; every rank knows it from
                the rows.
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
            learning_rate: The step's learning rate.
            meanwhile: Called again and again while other ranks still make their gradients, until
                it returns False. It must send nothing.
        """
        optimizers = [o for o in (self.decoder, self.vision) if o is not None]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.prepare_grads()
        norm = self._joint_norm(meanwhile)
        if not math.isfinite(norm):
            return StepOutcome(norm, learning_rate, was_applied=False)
        limit = self._run.training.optimizer.clip_gradient_norm
        for optimizer in optimizers:
            parameters = optimizer.get_parameters()
            if limit > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, limit, norm)
            optimizer.step_with_ready_grads()
        self._gather_weights()
        return StepOutcome(norm, learning_rate, was_applied=True)

    def _build(
        self, modules: list[torch.nn.Module], groups: ProcessGroupCollection
    ) -> MegatronOptimizer:
        optimizer = get_megatron_optimizer(
            optimizer_config(self._run),
            modules,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        assert isinstance(optimizer, ChainedOptimizer), "one for dense weights, one for experts"
        for part in optimizer.chained_optimizers:
            # Each would gather all weights, the other's too.
            part._defer_param_sync = True
        return optimizer

    def _gather_weights(self) -> None:
        """Give every replica what the others updated, where they share the optimizer."""
        if self._run.training.distributes_optimizer:
            for module in self._model.wrapped():
                module.start_param_sync()

    def _joint_norm(self, meanwhile: Callable[[], bool]) -> float:
        """Combine the norms of both grids, each of which all of its own ranks know."""
        squares = [
            0.0 if optimizer is None else float(optimizer.get_grad_norm()) ** 2
            for optimizer in (self.decoder, self.vision)
        ]
        device = torch.cuda.current_device()
        both = torch.tensor(squares, dtype=torch.float64, device=device)
        # A NaN must win over every number, which a maximum does not promise.
        both = both.nan_to_num(nan=math.inf, posinf=math.inf)
        agreed = dist.all_reduce(both, op=dist.ReduceOp.MAX, async_op=True)
        assert agreed is not None, "an asynchronous message"
        while not agreed.is_completed() and meanwhile():
            pass
        agreed.wait()
        return float(both.sum().sqrt())
