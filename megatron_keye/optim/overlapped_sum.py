# SPDX-License-Identifier: Apache-2.0
"""Sums the decoder's gradients over replicas bucket by bucket, while its backward pass still runs.

Megatron-Core starts a bucket's sum when each of its weights has reported as many gradients as in
the first step. Here that may differ: a row that attends densely teaches no indexer, an expert may
get no token, and replicas have different rows. So buckets start in one order that all ranks share,
each when its gradients and those before it are complete, and what is left after the last pass.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_keye.optim.measured import norm_of


class OverlappedSum:
    """Starts the sums of all buckets of this rank's stages; Megatron's wrappers wait for them."""

    def __init__(self, stages: list[DistributedDataParallel]) -> None:
        """Take over from the wrappers when sums start.

        Args:
            stages: Virtual stages in pipeline order, wrapped with `overlap_grad_reduce`.
        """
        self._groups: list[Any] = []
        for stage in reversed(stages):
            place = {weight: number for number, weight in enumerate(stage.parameters())}
            groups = stage.bucket_groups + stage.expert_parallel_bucket_groups
            # The backward pass comes to the first weights last.
            groups.sort(key=lambda group: min(map(place.__getitem__, group.params)), reverse=True)
            self._groups += groups
        for number, group in enumerate(self._groups):
            group.register_grad_ready = partial(self._note, number)
        self.begin_step()

    def begin_step(self) -> None:
        """Wait for the gradients of another step; call it before the wrappers are reset."""
        self._missing = [set(group.params) for group in self._groups]
        self._norms: list[Tensor] = []

    def start_rest(self) -> None:
        """Start all sums that the backward pass has not started, in the same order."""
        while len(self._norms) < len(self._groups):
            self._start_next()

    def own_norms(self) -> list[Tensor]:
        """Return the L2 norm of this rank's own gradients in each bucket: float64 []."""
        return self._norms

    def _note(self, number: int, weight: Tensor, force_all_reduce: bool | None = False) -> None:
        """Note a gradient; called by the wrapper's hook in each backward pass."""
        if not self._groups[number].is_last_microbatch:
            return
        self._missing[number].discard(weight)
        while len(self._norms) < len(self._groups) and not self._missing[len(self._norms)]:
            self._start_next()

    @torch.no_grad()
    def _start_next(self) -> None:
        group = self._groups[len(self._norms)]
        # Afterwards nobody could tell whose numbers were bad.
        own = [bucket.grad_data for bucket in group.buckets]
        self._norms.append(norm_of(own, own[0].device))
        group.start_grad_sync()
