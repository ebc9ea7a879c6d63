# SPDX-License-Identifier: Apache-2.0
"""The outputs of an attention's first call, kept for a second call with the same inputs.

A recomputed layer calls its attention twice: without gradients, and again in the backward pass.
What the backward pass of attention needs beside its inputs are its outputs, which are far smaller
than the work of making them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megatron_keye.kernels.host_tensor import HostTensor


class KeptOutputs:
    """Outputs in the order in which they were made; the second call takes them out again."""

    def __init__(self, *, in_host_memory: bool = False) -> None:
        """Begin without any: the next call is the first one.

        Args:
            in_host_memory: Whether they wait there between the two calls.
        """
        self._outputs: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._takes, self._in_host_memory = False, in_host_memory

    def begin_second_call(self) -> None:
        """Give out from now on what the first call kept."""
        self._takes = True

    def outputs_of(self, operator: str, compute: Callable[[], Sequence[Any]]) -> tuple[Any, ...]:
        """Return what `compute` returns, in the second call what it returned in the first.

        Args:
            operator: Name of what runs, the same in both calls.
            compute: Runs it; tensors and other values.
        """
        if self._takes:
            first, kept = self._outputs.popleft()
            assert first == operator, f"got {operator} in the second call, {first} in the first"
            return tuple(
                each.on_device() if isinstance(each, HostTensor) else each for each in kept
            )
        outputs = tuple(each.detach() if isinstance(each, Tensor) else each for each in compute())
        self._outputs.append((operator, tuple(map(self._kept, outputs))))
        return outputs

    def _kept(self, output: Any) -> Any:
        keeps_away = self._in_host_memory and isinstance(output, Tensor)
        return HostTensor(output) if keeps_away else output
