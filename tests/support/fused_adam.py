# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the fused Adams of Transformer Engine and apex, which need a GPU.

It keeps its state as they do: moments per weight, the number of updates per group and only from
the first one on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer


class FusedAdam(torch.optim.Optimizer):
    """AdamW on float32, with the arguments that Megatron passes."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Make the optimizer; `adam_w_mode` decouples the weight decay."""
        assert adam_w_mode and not capturable, "the stand-in knows nothing else"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            _ = group["params"][0].device  # apex expects a weight in each group
            group["step"] = group["step"] + 1 if "step" in group else 1
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Any, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in "12")
        for tensor in (weight, *state.values()):
            if tensor.dtype != torch.float32:
                raise RuntimeError("FusedAdam only supports float32 here")
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(weight.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
        bias1, bias2 = (1 - beta ** group["step"] for beta in (beta1, beta2))
        update = (mean / bias1) / ((square / bias2).sqrt() + group["eps"])
        weight.sub_(group["lr"] * (update + group["weight_decay"] * weight))


@contextmanager
def fused_adam() -> Iterator[None]:
    """Let Megatron build its optimizers with the stand-in, as where a fused one is installed."""
    before = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = before
