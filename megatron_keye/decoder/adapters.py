# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters inside Megatron's linears: subclasses whose weights keep their names.

Each adds scale * B (A x) to the output of its frozen linear, whether that is Megatron's own or
Transformer Engine's. Under tensor parallelism the linear's input or output is split, and with it
B or A; what is not split is replicated, and sees a part of the sequence on each rank.

Source: Hu et al., arXiv 2106.09685.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.functional import linear

from megatron_keye.config.lora import LORA_A, LORA_B, LoraConfig

Sharded = dict[str, Any]


def adapt_column(base: type, lora: LoraConfig) -> type:
    """Return a column-parallel linear class with an adapter."""
    return _subclass(_ColumnAdapter, base, lora)


def adapt_row(base: type, lora: LoraConfig) -> type:
    """Return a row-parallel linear class with an adapter."""
    return _subclass(_RowAdapter, base, lora)


def adapt_experts(experts: partial[Any], lora: LoraConfig) -> partial[Any]:
    """Return the builder of Transformer Engine's experts with an adapter for each expert.

    Args:
        experts: Megatron's builder, with the classes of both linears in its `submodules`.
        lora: Rank and scale.
    """
    both: Any = experts.keywords["submodules"]
    adapted = dataclasses.replace(
        both,
        linear_fc1=_subclass(_GroupedAdapter, both.linear_fc1, lora),
        linear_fc2=_subclass(_GroupedAdapter, both.linear_fc2, lora),
    )
    return partial(experts, submodules=adapted)


def _subclass(adapter: type, base: type, lora: LoraConfig) -> type:
    return type(f"Adapted{base.__name__}", (adapter, base), {"lora": lora})


class _TensorParallelAdapter(torch.nn.Module):
    """The part that column- and row-parallel linears share; the linear itself comes after it."""

    lora: LoraConfig
    weight: Tensor
    lora_a: Parameter
    lora_b: Parameter
    split: str
    """Name of the matrix that is split over tensor ranks."""
    split_dim: int
    """Dimension along which it is."""
    communicate: Callable[..., Tensor]
    """Megatron's mapping of the narrow hidden states over tensor ranks."""

    def __init__(
        self, num_inputs: int, num_outputs: int, *, tp_group: ProcessGroup, **options: Any
    ) -> None:
        super().__init__(num_inputs, num_outputs, tp_group=tp_group, **options)
        self.adapter_group = tp_group
        # The weight's own shape, in which one of both sizes is this rank's share.
        num_outputs, num_inputs = self.weight.shape
        shapes = {LORA_A: (self.lora.rank, num_inputs), LORA_B: (num_outputs, self.lora.rank)}
        for name, shape in shapes.items():
            matrix = _new_matrix(shape, self.weight)
            if name == self.split:
                set_tensor_model_parallel_attributes(matrix, True, self.split_dim, 1)
            else:
                # Megatron all-reduces the gradients of such parameters over the tensor axis.
                matrix.sequence_parallel = tp_group.size() > 1  # type: ignore[attr-defined]
            self.register_parameter(name, matrix)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return output [..., outputs] of [..., inputs], and the bias that Megatron adds later."""
        output, bias = super().forward(hidden)
        narrow = linear(hidden, self.lora_a) * self.lora.scale
        if self.adapter_group.size() > 1:
            narrow = self.communicate(narrow, group=self.adapter_group)
        return output + linear(narrow, self.lora_b), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Sharded:
        """Return the linear's tensors for checkpoints, and the adapter's beside them."""
        linear_class: Any = super()
        state: Sharded = linear_class.sharded_state_dict(prefix, sharded_offsets, metadata)
        assert metadata is not None, "the caller names the replicas"
        state |= make_sharded_tensors_for_checkpoint(
            {LORA_A: self.lora_a, LORA_B: self.lora_b},
            prefix,
            {self.split: self.split_dim},
            sharded_offsets,
            tp_group=self.adapter_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class _ColumnAdapter(_TensorParallelAdapter):
    """Outputs [..., outputs/TP] are split, so B is; inputs are a rank's part of the sequence."""

    split, split_dim = LORA_B, 0
    communicate = staticmethod(gather_from_sequence_parallel_region)


class _RowAdapter(_TensorParallelAdapter):
    """Inputs [..., inputs/TP] are split, so A is, and each rank has a part of the sum over them.

    Outputs are a rank's part of the sequence.
    """

    split, split_dim = LORA_A, 1
    communicate = staticmethod(reduce_scatter_to_sequence_parallel_region)


class _GroupedAdapter(torch.nn.Module):
    """Adapters of all experts of a rank, whose weights Transformer Engine numbers likewise."""

    lora: LoraConfig

    def __init__(
        self,
        num_experts: int,
        num_inputs: int,
        num_outputs: int,
        *,
        pg_collection: ProcessGroupCollection,
        **options: Any,
    ) -> None:
        super().__init__(
            num_experts, num_inputs, num_outputs, pg_collection=pg_collection, **options
        )
        self.num_experts, self.adapter_groups = num_experts, pg_collection
        shapes = {LORA_A: (self.lora.rank, num_inputs), LORA_B: (num_outputs, self.lora.rank)}
        for expert in range(num_experts):
            for name, shape in shapes.items():
                matrix = _new_matrix(shape, getattr(self, f"weight{expert}"))
                self.register_parameter(f"{name}{expert}", matrix)

    def forward(self, hidden_RX: Tensor, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return [R, outputs] of [R, inputs], sorted by expert.

        Args:
            hidden_RX: Routed tokens.
            rows: How many each expert has.
        """
        output, bias = super().forward(hidden_RX, rows)
        deltas = []
        for expert, part in enumerate(hidden_RX.split(rows)):
            a, b = (getattr(self, f"{name}{expert}") for name in (LORA_A, LORA_B))
            deltas.append(linear(linear(part, a) * self.lora.scale, b))
        return output + torch.cat(deltas), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Sharded:
        """Return the linear's tensors for checkpoints, and the adapters' stacked like them."""
        linear_class: Any = super()
        state: Sharded = linear_class.sharded_state_dict(prefix, sharded_offsets, metadata)
        assert metadata is not None, "the caller names the replicas"
        groups = self.adapter_groups
        num_ranks, rank = groups.ep.size(), groups.ep.rank()
        for expert in range(self.num_experts):
            index = rank * self.num_experts + expert
            stacked = (len(sharded_offsets), index, num_ranks * self.num_experts)
            sharded = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"{name}{expert}") for name in (LORA_A, LORA_B)},
                prefix,
                {},
                (*sharded_offsets, stacked),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name, tensor in sharded.items():
                tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
                state[f"{name}{expert}"] = tensor
        return state


def _new_matrix(shape: tuple[int, int], weight: Tensor) -> Parameter:
    """Return an adapter's matrix, whose gradients are reduced over the ranks of a weight's."""
    matrix = Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
    matrix.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
    return matrix
