# SPDX-License-Identifier: Apache-2.0
"""A tensor of a GPU that waits in host memory, copied beside the computation."""

import functools

import torch
from torch import Tensor

_MIN_BYTES = 2**20
"""Smaller tensors stay: a copy takes longer to launch than to run."""


class HostTensor:
    """A tensor in pinned host memory; one that is small, or on a CPU, stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        """Start to copy a tensor, whose memory on the GPU is free once nothing else holds it.

        Args:
            tensor: Any type and strides; it must not be changed afterwards.
        """
        self._device, self._copied = tensor.device, None
        if not tensor.is_cuda or tensor.nbytes < _MIN_BYTES:
            self._tensor = tensor
            return
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = stream.record_event()
        tensor.record_stream(stream)

    def on_device(self) -> Tensor:
        """Return the tensor on its GPU; the current stream waits for it."""
        if self._copied is None:
            return self._tensor
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._tensor.to(self._device, non_blocking=True)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies to the host, so that they run beside the computation."""
    return torch.cuda.Stream(device)
