# SPDX-License-Identifier: Apache-2.0
"""Decides which fused kernels of the decoder a run takes on a machine, and which plain forms.

`config/megatron.py` tells Megatron-Core. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_keye.config.backends import (
    APEX_INSTALL,
    TRANSFORMER_ENGINE_INSTALL,
    has_weight_gradient_extension,
    transformer_engine_version,
)
from megatron_keye.config.fusions import Fusion
from megatron_keye.config.training import TrainingConfig
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Fusions:
    """The fused kernels that a run takes; all plain by default."""

    permutation: bool = False
    router: bool = False
    swiglu: bool = False
    norm: bool = False
    weight_gradients: bool = False
    """Of the linear layers, and of Transformer Engine's experts."""
    output_weight_gradients: bool = False
    """Of the output layer, which is always Megatron-Core's own."""

    def names(self) -> list[str]:
        """Return those that run, by name."""
        return [name for name, runs in asdict(self).items() if runs]


PLAIN = Fusions()


def choose_fusions(
    training: TrainingConfig, *, has_gpu: bool, uses_transformer_engine: bool
) -> Fusions:
    """Return the fused kernels that a run takes here.

    Args:
        training: The run's fusions and precision.
        has_gpu: Whether the run is on GPUs.
        uses_transformer_engine: Whether linear layers are Transformer Engine's.

    Raises:
        UserError: When a fusion is "on" that cannot run here.
        RuntimeError: When Transformer Engine is only partly installed.
    """
    wanted = training.fusions
    everywhere = [
        "without a GPU" if not has_gpu else "",
        "with training.precision = 'fp64', which no fused kernel has"
        if training.precision == "fp64"
        else "",
    ]
    engine = [
        *everywhere,
        f"without Transformer Engine (to install it: {TRANSFORMER_ENGINE_INSTALL})"
        if transformer_engine_version() is None
        else "",
    ]
    has_extension = has_weight_gradient_extension()
    linears = [
        *everywhere,
        "with Megatron-Core's own linear layers and without NVIDIA's apex "
        f"(to install it: {APEX_INSTALL})"
        if not (uses_transformer_engine or has_extension)
        else "",
    ]
    weight_gradients = _takes(wanted.weight_gradients, "weight_gradients", linears)
    return Fusions(
        permutation=_takes(wanted.permutation, "permutation", engine),
        router=_takes(wanted.router, "router", engine),
        swiglu=_takes(wanted.swiglu, "swiglu", everywhere),
        norm=_takes(wanted.norm, "norm", engine),
        weight_gradients=weight_gradients,
        output_weight_gradients=weight_gradients and has_extension,
    )


def _takes(wanted: Fusion, name: str, obstacles: Sequence[str]) -> bool:
    """Return whether a fusion runs; `obstacles` are reasons against it, "" where there is none."""
    obstacle = next(filter(None, obstacles), "")
    if wanted == "on" and obstacle:
        raise UserError(f"training.fusions.{name}: got 'on' {obstacle}, expected 'auto' or 'off'")
    return wanted != "off" and not obstacle
