# SPDX-License-Identifier: Apache-2.0
"""The linears of all experts of a rank as one: stacked weights, multiplied by a grouped product.

A loop over the experts would launch a kernel for each of them, 128 in the released model, and a
step of short rows would wait for launches. Where torch has no grouped product, for float64 and for
vectors that are no multiple of 16 bytes, each expert is multiplied alone.

Shape letters: E experts of a rank, R rows routed to them, sorted by expert; X, Y a linear's inputs
and outputs.
"""

from itertools import pairwise

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from megatron_keye.config.lora import LORA_A, LORA_B, LoraConfig

_ALIGNMENT_BYTES = 16


def grouped_product(input_RX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Return each row times the transposed weight of its expert, [R, Y].

    Args:
        input_RX: Rows, in the type of the weights.
        weight_EYX: Weights; an expert without rows gets zeros as their gradient.
        ends_E: int32: where each expert's rows end, on the device of the rows.
    """
    if not len(input_RX):
        # No kernel runs over nothing; all weights still get a gradient, of zeros.
        return linear(input_RX, weight_EYX[0])
    if not _has_kernel(weight_EYX):
        return plain_grouped_product(input_RX, weight_EYX, ends_E)
    output_RY = grouped_mm(input_RX, weight_EYX.transpose(1, 2), offs=ends_E)
    if output_RY.requires_grad:
        # Its backward pass refuses the expanded gradient of a sum.
        output_RY.register_hook(Tensor.contiguous)
    return output_RY


def plain_grouped_product(input_RX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Compute `grouped_product` by one product an expert; waits for the device."""
    bounds = pairwise([0, *ends_E.tolist()])
    parts = [
        linear(input_RX[start:end], weight_YX)
        for (start, end), weight_YX in zip(bounds, weight_EYX, strict=True)
    ]
    return torch.cat(parts)


def _has_kernel(weight_EYX: Tensor) -> bool:
    sizes = [size * weight_EYX.element_size() for size in weight_EYX.shape[1:]]
    is_aligned = not any(size % _ALIGNMENT_BYTES for size in sizes)
    return is_aligned and weight_EYX.dtype != torch.float64


class GroupedLinear(torch.nn.Module):
    """One linear of each expert, without bias; with an adapter if the experts have some."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def __init__(
        self,
        num_experts: int,
        num_inputs: int,
        num_outputs: int,
        *,
        config: TransformerConfig,
        lora: LoraConfig | None,
    ) -> None:
        """Allocate weights; they are drawn later.

        Args:
            num_experts: Experts of this rank.
            num_inputs: X.
            num_outputs: Y.
            config: Dtype, device and degrees.
            lora: Rank and scale of each expert's adapter; None without adapters.
        """
        super().__init__()
        self.lora = lora
        shapes = {"weight": (num_outputs, num_inputs)}
        if lora is not None:
            shapes |= {LORA_A: (lora.rank, num_inputs), LORA_B: (num_outputs, lora.rank)}
        for name, shape in shapes.items():
            self.register_parameter(name, _new_parameter((num_experts, *shape), config))

    def forward(self, input_RX: Tensor, ends_E: Tensor) -> Tensor:
        """Return the outputs [R, Y] of rows that are sorted by expert.

        Args:
            input_RX: Rows.
            ends_E: int32: where each expert's rows end.
        """
        output_RY = grouped_product(input_RX, self.weight, ends_E)
        if self.lora is None:
            return output_RY
        narrow = grouped_product(input_RX, self.lora_a, ends_E) * self.lora.scale
        return output_RY + grouped_product(narrow, self.lora_b, ends_E)


def _new_parameter(shape: tuple[int, ...], config: TransformerConfig) -> torch.nn.Parameter:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    data = torch.empty(shape, dtype=config.params_dtype, device=device)
    parameter = torch.nn.Parameter(data)
    # Megatron reduces gradients over the experts' own replicas where this is False: experts are
    # never split over tensor ranks, each of which has tokens of its own.
    has_own_replicas = (
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )
    parameter.allreduce = not has_own_replicas  # type: ignore[attr-defined]
    return parameter
