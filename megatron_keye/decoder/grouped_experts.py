# SPDX-License-Identifier: Apache-2.0
"""The experts of a rank as one module, and the layer that routes tokens to them.

Megatron-Core's own, SequentialMLP and TEGroupedMLP, have a weight for each expert; checkpoints are
the same.

Shape letters: D hidden size, E experts of a rank, F hidden size of an expert, R rows routed to
this rank, sorted by expert.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from megatron_keye.config.lora import LoraConfig
from megatron_keye.decoder.grouped_linear import GroupedLinear


class GroupedExperts(MegatronModule):
    """Gated experts: two linears with SwiGLU between them."""

    def __init__(
        self,
        num_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Allocate weights; called by Megatron's layer.

        Args:
            num_experts: Experts of this rank.
            config: Sizes, dtype, device and degrees.
            pg_collection: The decoder's process groups.
            name: Unused.
            lora: Rank and scale of each expert's adapters; None without adapters.
        """
        super().__init__(config=config)
        self.num_experts, self.groups = num_experts, pg_collection
        width, inner = config.hidden_size, config.moe_ffn_hidden_size
        assert inner is not None, "the decoder has experts"
        build: dict[str, Any] = {"config": config, "lora": lora}
        self.linear_fc1 = GroupedLinear(num_experts, width, 2 * inner, **build)
        self.linear_fc2 = GroupedLinear(num_experts, inner, width, **build)

    def forward(
        self, hidden_RD: Tensor, num_rows_E: Tensor, probabilities_R: Tensor
    ) -> tuple[Tensor, None]:
        """Return the experts' outputs [R, D], and no bias.

        Args:
            hidden_RD: Routed tokens.
            num_rows_E: How many each expert has, integers.
            probabilities_R: What the router weighs each by.
        """
        ends_E = num_rows_E.cumsum(0, dtype=torch.int32)
        inner_RF = self._activation(self.linear_fc1(hidden_RD, ends_E), probabilities_R[:, None])
        return self.linear_fc2(inner_RF, ends_E), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensorFactory]:
        """Return the weights for checkpoints, in which each expert is a shard of its own."""
        axis, num_ranks = len(sharded_offsets), self.groups.ep.size()
        first = self.groups.ep.rank() * self.num_experts

        def shards(key: str, stacked: Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    weight,
                    *sharded_offsets,
                    (axis, first + index, num_ranks * self.num_experts),
                    replica_id=replica_id,
                    prepend_axis_num=axis + 1,
                )
                for index, weight in enumerate(stacked.detach())
            ]

        # Megatron's form: among stages, tensor ranks and replicas.
        replica_id = (0, 0, self.groups.expt_dp.rank())
        return {
            prefix + name: ShardedTensorFactory(
                f"{prefix}experts.{name}", weight, shards, _stacked, replica_id
            )
            for name, weight in self.named_parameters()
        }

    def _activation(self, gate_and_up: Tensor, probabilities_R1: Tensor) -> Tensor:
        """Return SwiGLU [R, F] of gate and up [R, 2F], weighted by the router."""
        if self.config.bias_activation_fusion:
            weighted: Tensor = weighted_bias_swiglu_impl(gate_and_up, None, probabilities_R1)
            return weighted
        gate_RF, up_RF = gate_and_up.chunk(2, dim=-1)
        return (silu(gate_RF) * up_RF * probabilities_R1).to(gate_and_up.dtype)


def _stacked(weights: list[Tensor]) -> Tensor:
    """Return the stacked weight that some experts' are views of, without a copy."""
    first, last = weights[0], weights[-1]
    distance = (len(weights) - 1) * first.nbytes
    assert last.data_ptr() - first.data_ptr() == distance, "experts lie behind one another"
    return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))


class GroupedExpertLayer(MoELayer):
    """Router and experts, which learn on the device how many tokens each expert has."""

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        """Build Megatron's layer; its arguments."""
        super().__init__(config, pg_collection=pg_collection, **options)
        self.token_dispatcher = _Dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )


class _Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all, without copying to the host what only the experts need.

    Without expert parallelism the host then waits for nothing and stays ahead of the device.
    """

    def _maybe_update_cuda_sync_point(self, point: str) -> None:
        # Megatron waits there for the experts' numbers of tokens alone.
        if point != "before_finish":
            super()._maybe_update_cuda_sync_point(point)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor | None:
        exchanges = self.ep_size > 1 or self.tp_size > 1
        if exchanges or not self.config.moe_permute_fusion:
            super()._maybe_dtoh_and_synchronize(point)
        # Else the host learns nothing, and the stream of its copies would leave a CUDA graph open.
        return tokens_per_expert
