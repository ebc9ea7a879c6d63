# SPDX-License-Identifier: Apache-2.0
"""Self-attention of one decoder layer: grouped-query attention to the keys its indexer selects.

It replaces the whole of Megatron's SelfAttention, since the indexer needs the layer's input, and
a recomputed layer must keep its selection and may keep what attention gave.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.profiler import record_function

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import Recompute
from megatron_keye.decoder.auxiliary_loss import attach_loss
from megatron_keye.decoder.cached_attention import attend_densely, attend_sparsely
from megatron_keye.decoder.indexer import Indexer
from megatron_keye.decoder.norm import RMSNorm
from megatron_keye.decoder.recall import measure_recall
from megatron_keye.decoder.recomputation import KeptAttention, PackedSelection
from megatron_keye.decoder.row import DecoderRow
from megatron_keye.decoder.row_heads import RowHeads, RowIndexerHeads
from megatron_keye.kernels.dense_attention import dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.rotary import rotate
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.parallel.context import RowGather


@dataclass(frozen=True)
class AttentionLinears:
    """Classes of the linear layers of the attention."""

    column: Any
    """Column-parallel: outputs are split over tensor ranks."""
    row: Any
    """Row-parallel: inputs are split over tensor ranks."""


class SparseSelfAttention(MegatronModule):
    """Grouped-query attention: sparse, or dense in the dense phase and the indexer's warm-up."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionLinears,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        *,
        decoder: DecoderConfig,
        recompute: Recompute,
        keeps_in_host_memory: bool,
        norm: Callable[[TransformerConfig, int, float], RMSNorm],
        **unused: Any,
    ) -> None:
        """Build one layer's attention; called by Megatron's TransformerLayer.

        Args:
            config: Megatron's configuration of sizes and degrees.
            submodules: Classes of the two linear layers.
            layer_number: 1-based number of the layer in the whole model.
            pg_collection: Process groups, of which tp and cp are used.
            decoder: Sizes of the decoder.
            recompute: What the backward pass computes again.
            keeps_in_host_memory: Whether what is kept for that waits there.
            norm: Builds the norms of queries and keys from configuration, channels and epsilon.
            unused: Arguments of other kinds of attention.
        """
        super().__init__(config=config)
        self.layer_number, self.top_k = layer_number, decoder.indexer.top_k
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.head_dim = decoder.head_dim
        self.heads_per_group = decoder.num_heads // decoder.num_kv_heads
        self.is_recomputed = recompute in ("selective", "full")
        self.keeps_outputs = recompute == "selective"
        self.in_host_memory = keeps_in_host_memory
        groups, width = decoder.num_kv_heads, decoder.num_heads * decoder.head_dim
        build = {"config": config, "init_method": config.init_method, "bias": False}
        build |= {"is_expert": False, "tp_group": self.tp_group}
        # One weight, ordered by key-value group as [its query heads, key, value], so that a tensor
        # rank's shard has whole groups.
        self.linear_qkv = submodules.column(
            config.hidden_size,
            groups * (self.heads_per_group + 2) * decoder.head_dim,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **build,
        )
        self.linear_proj = submodules.row(
            width,
            config.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **build,
        )
        # Megatron all-reduces the gradients of these two over the tensor axis by their names.
        self.q_layernorm = norm(config, decoder.head_dim, decoder.rms_norm_eps)
        self.k_layernorm = norm(config, decoder.head_dim, decoder.rms_norm_eps)
        self.indexer = Indexer(config, decoder.indexer)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: DecoderRow,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend within one packed row.

        Args:
            hidden_states: [S/CP/TP, 1, D] under sequence parallelism, else [S/CP, 1, D].
            attention_mask: Unused; the row has the visible keys of each query.
            packed_seq_params: The row, which Megatron's block passes on under this name.
            unused: Arguments of other kinds of attention.

        Returns:
            The output in the shape of `hidden_states`, and None for a bias.
        """
        row = packed_seq_params
        kept = self._kept(row)
        heads, indexer = self._project(hidden_states, row)
        loss = None
        if row.cache is not None:
            out_THC = self._attend_in_cache(heads, indexer, row)
        elif indexer is None:
            out_THC, _ = self._attend_densely(heads, row, kept)
        elif row.phase == "sparse":
            out_THC, loss = self._attend_sparsely(heads, indexer, row, kept)
        else:
            out_THC, loss = self._warm_up_indexer(heads, indexer, row, kept)
        projected_SBD = cast(Tensor, self.linear_proj(out_THC.flatten(1)[:, None])[0])
        if loss is not None:
            projected_SBD = attach_loss(projected_SBD, loss)
        return projected_SBD, None

    @property
    def _measures_indexer(self) -> bool:
        """False in the first of the two passes of a recomputed layer."""
        return torch.is_grad_enabled() or not self.training

    def _kept(self, row: DecoderRow) -> KeptAttention:
        """Return what this layer keeps of a row: to be filled in the first pass, then filled."""
        if not (self.is_recomputed and self.training):
            return KeptAttention(None)
        if torch.is_grad_enabled():
            return row.kept.pop(self.layer_number).of_second_pass()
        outputs = KeptOutputs(in_host_memory=self.in_host_memory) if self.keeps_outputs else None
        row.kept[self.layer_number] = kept = KeptAttention(outputs)
        return kept

    def _project(
        self, hidden_SBD: Tensor, row: DecoderRow
    ) -> tuple[RowHeads, RowIndexerHeads | None]:
        """Project hidden states, and start to gather what other ranks need of them.

        The indexer's keys travel first, and those and the values of attention while it selects.
        Work is called in the order that lets the backward pass hide the way back (`RowGather`).
        """
        mixed_SBX = self.linear_qkv(hidden_SBD)[0]
        mixed_TGX = mixed_SBX.squeeze(1).unflatten(
            -1, (-1, self.heads_per_group + 2, self.head_dim)
        )
        q_TGHC, k_TGC, v_TGC = mixed_TGX.split([self.heads_per_group, 1, 1], dim=2)
        k_TGC = rotate(self.k_layernorm(k_TGC.squeeze(2)), *row.attention_rotary)
        gather = self._gather(row, k_TGC, v_TGC.squeeze(2))
        indexer = None
        if row.phase == "sparse" or (row.phase == "indexer_warmup" and self._measures_indexer):
            indexer = self._project_indexer(hidden_SBD, row)
            indexer.gather.start()
        q_THC = rotate(self.q_layernorm(q_TGHC.flatten(1, 2)), *row.attention_rotary)
        gather.start()
        return RowHeads(q_THC, gather), indexer

    def _project_indexer(self, hidden_SBD: Tensor, row: DecoderRow) -> RowIndexerHeads:
        """Run the indexer on the detached input, since it learns from its own loss only."""
        hidden_SBD = hidden_SBD.detach()
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=self.tp_group)
        q_TIJ, k_TJ, gate_TI = self.indexer(hidden_SBD.squeeze(1), row.indexer_rotary)
        return RowIndexerHeads(q_TIJ, self._gather(row, k_TJ), gate_TI)

    def _gather(self, row: DecoderRow, *local: Tensor) -> RowGather:
        return RowGather(*local, order_S=row.gathered_order_S, group=self.cp_group)

    @record_function("decoder.attention.dense")
    def _attend_densely(
        self, heads: RowHeads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor]:
        """Return out_THC and lse_TH, the log-sum-exp of each query's logits."""
        k_SGC, v_SGC = heads.gather.rows()
        return dense_attention_with_lse(
            heads.q_THC,
            k_SGC,
            v_SGC,
            row.key_start_T,
            row.key_end_T,
            scale=self.head_dim**-0.5,
            key_reach_S=row.key_reach_S,
            kept=kept.outputs,
        )

    @record_function("decoder.indexer.scores")
    def _select(self, indexer: RowIndexerHeads, row: DecoderRow, kept: KeptAttention) -> Tensor:
        """Return indices_TK, in the second pass of a recomputed layer those of the first one."""
        if kept.selection is not None:
            return kept.selection.unpack()
        (k_SJ,) = indexer.gather.rows()
        indices_TK = lightning_indexer(
            indexer.q_TIJ.detach(),
            k_SJ.detach(),
            indexer.gate_TI.detach(),
            row.key_start_T,
            row.key_end_T,
            self.top_k,
            key_reach_S=row.key_reach_S,
            is_rounded=self.indexer.rounds_to_fp8,
        )
        if self.is_recomputed and not self._measures_indexer:
            kept.selection = PackedSelection.of(
                indices_TK, len(k_SJ), in_host_memory=self.in_host_memory
            )
        return indices_TK

    @record_function("decoder.attention.selected")
    def _attend_sparsely(
        self, heads: RowHeads, indexer: RowIndexerHeads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor | None]:
        """Return out_THC and a loss that teaches the indexer, or None where it is not measured."""
        indices_TK = self._select(indexer, row, kept)
        row.meter.record("topk_indices", self.layer_number, indices_TK)
        scores_TK = None
        if self._measures_indexer:
            # Before attention, so that in the backward pass they hide the sum of dK and dV.
            (k_SJ,) = indexer.gather.rows()
            scores_TK = selected_indexer_scores(indexer.q_TIJ, k_SJ, indexer.gate_TI, indices_TK)
        k_SGC, v_SGC = heads.gather.rows()
        operands = heads.q_THC, k_SGC, v_SGC, indices_TK
        options: dict[str, Any] = {"scale": self.head_dim**-0.5, "kept": kept.outputs}
        if scores_TK is None:
            out_THC, _ = sparse_attention(*operands, with_target=False, **options)
            return out_THC, None
        out_THC, loss = sparse_attention_with_loss(
            *operands,
            scores_TK,
            row.kl_weights(),
            partial(row.meter_kl, self.layer_number),
            **options,
        )
        measure_recall(heads.q_THC, k_SGC, indices_TK, row)
        return out_THC, loss

    def _attend_in_cache(
        self, heads: RowHeads, indexer: RowIndexerHeads | None, row: DecoderRow
    ) -> Tensor:
        """Return out_THC of new tokens, whose keys are then in the cache."""
        assert row.cache is not None and self.cp_group.size() == 1, "a row's tokens are all here"
        layer, ranges = row.cache.layers[self.layer_number - 1], (row.key_start_T, row.key_end_T)
        if indexer is None:
            return attend_densely(heads, layer, row.cache, ranges)
        out_THC, indices_TK = attend_sparsely(
            heads, indexer, layer, row.cache, ranges, top_k=self.top_k
        )
        row.meter.record("topk_indices", self.layer_number, indices_TK)
        return out_THC

    @record_function("decoder.indexer.loss")
    def _warm_up_indexer(
        self, heads: RowHeads, indexer: RowIndexerHeads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor]:
        """Return out_THC of dense attention and the indexer's loss over all keys."""
        out_THC, lse_TH = self._attend_densely(heads, row, kept)
        (k_SGC, _), (k_SJ,) = heads.gather.rows(), indexer.gather.rows()
        loss, kl_TG = dense_indexer_loss(
            indexer.q_TIJ,
            k_SJ,
            indexer.gate_TI,
            heads.q_THC,
            k_SGC,
            row.key_start_T,
            row.key_end_T,
            row.kl_weights(),
            lse_TH,
            scale=self.head_dim**-0.5,
            key_reach_S=row.key_reach_S,
        )
        row.meter_kl(self.layer_number, kl_TG)
        return out_THC, loss
