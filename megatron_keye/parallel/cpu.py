# SPDX-License-Identifier: Apache-2.0
"""Lets Megatron-Core, which assumes a GPU, run in gloo processes without one.

So every parallel layout can be tested on an ordinary machine. Each patch below covers one
assumption of megatron-core 0.19.2; none is active where there is a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_active: list["_CudaMeansCpu"] = []


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites literal "cuda" devices and CUDA-only calls in torch functions to their CPU form."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron compares with the names of CUDA tensor types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """Stand-in for a CUDA stream or event, where everything already runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: work on the CPU is ordered."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def record(self, stream: Any = None) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> "_NoStream":
        """Return an event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Do nothing."""


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@contextmanager
def _no_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def run_megatron_on_cpu() -> None:
    """Make Megatron-Core's GPU calls work on the CPU, for the rest of this process.

    Idempotent. Call it before building any Megatron module.

    Raises:
        RuntimeError: If torch sees a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "run_megatron_on_cpu: got a machine with a GPU, expected none; hide the GPU "
            "(CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    if _active:
        return
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "synchronize": lambda *args: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "initial_seed": torch.initial_seed,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": _no_context,
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    _patch_megatron()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _active.append(mode)


def _patch_megatron() -> None:
    """Replace the functions in which Megatron-Core bypasses torch's public API."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Upstream converts only GPU tensors to NumPy; the all-to-all would get tensors.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
