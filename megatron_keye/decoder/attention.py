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

from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import Recompute
from megatron_keye.decoder.auxiliary_loss import attach_loss
from megatron_keye.decoder.cached_attention import (
    NewHeads,
    NewIndexerHeads,
    attend_densely,
    attend_sparsely,
)
from megatron_keye.decoder.indexer import Indexer
from megatron_keye.decoder.norm import RMSNorm
from megatron_keye.decoder.recall import measure_recall
from megatron_keye.decoder.recomputation import KeptAttention, PackedSelection
from megatron_keye.decoder.row import DecoderRow
from megatron_keye.kernels.dense_attention import dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.rotary import rotate
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.parallel.context import gather_row


@dataclass(frozen=True)
class AttentionLinears:
    """Classes of the linear layers of the attention."""

    column: Any
    """Column-parallel: outputs are split over tensor ranks."""
    row: Any
    """Row-parallel: inputs are split over tensor ranks."""


@dataclass(frozen=True)
class _Heads:
    """Rotated queries of the local tokens, and keys and values of the whole row."""

    q_THC: Tensor
    k_SGC: Tensor
    v_SGC: Tensor


@dataclass(frozen=True)
class _IndexerHeads:
    """The indexer's queries and gates of the local tokens, and its keys of the whole row."""

    q_TIJ: Tensor
    k_SJ: Tensor
    gate_TI: Tensor


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
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.head_dim = decoder.head_dim
        self.heads_per_group = decoder.num_heads // decoder.num_kv_heads
        self.top_k = decoder.indexer.top_k
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
        heads = self._project(hidden_states, row)
        loss = None
        if row.cache is not None:
            out_THC = self._attend_in_cache(heads, hidden_states, row)
        elif row.phase == "dense":
            out_THC, _ = self._attend_densely(heads, row, kept)
        else:
            indexer_heads = self._project_indexer(hidden_states, row)
            attend = self._attend_sparsely if row.phase == "sparse" else self._warm_up_indexer
            out_THC, loss = attend(heads, indexer_heads, row, kept)
        out_SBX = out_THC.flatten(1)[:, None]
        projected_SBD = cast(Tensor, self.linear_proj(out_SBX)[0])
        if loss is not None:
            projected_SBD = attach_loss(projected_SBD, loss)
        return projected_SBD, None

    @property
    def _measures_indexer(self) -> bool:
        """False in the first of the two passes of a recomputed layer."""
        return torch.is_grad_enabled() or not self.training

    def _kept(self, row: DecoderRow) -> KeptAttention:
        """Return what this layer keeps of a row: to be filled in the first pass, then filled."""
        if self.is_recomputed and self.training:
            if torch.is_grad_enabled():
                kept = row.kept.pop(self.layer_number)
                if kept.outputs is not None:
                    kept.outputs.begin_second_call()
                return kept
            outputs = KeptOutputs(in_host_memory=self.in_host_memory)
            kept = KeptAttention(outputs if self.keeps_outputs else None)
            row.kept[self.layer_number] = kept
            return kept
        return KeptAttention(None)

    def _project(self, hidden_SBD: Tensor, row: DecoderRow) -> _Heads:
        mixed_SBX = self.linear_qkv(hidden_SBD)[0]
        mixed_TGX = mixed_SBX.squeeze(1).unflatten(
            -1, (-1, self.heads_per_group + 2, self.head_dim)
        )
        q_TGHC, k_TGC, v_TGC = mixed_TGX.split([self.heads_per_group, 1, 1], dim=2)
        q_THC = rotate(self.q_layernorm(q_TGHC.flatten(1, 2)), *row.attention_rotary)
        k_TGC = rotate(self.k_layernorm(k_TGC.squeeze(2)), *row.attention_rotary)
        return _Heads(q_THC, self._gather(k_TGC, row), self._gather(v_TGC.squeeze(2), row))

    def _project_indexer(self, hidden_SBD: Tensor, row: DecoderRow) -> _IndexerHeads:
        """Run the indexer on the detached input, since it learns from its own loss only."""
        hidden_SBD = hidden_SBD.detach()
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=self.tp_group)
        q_TIJ, k_TJ, gate_TI = self.indexer(hidden_SBD.squeeze(1), row.indexer_rotary)
        return _IndexerHeads(q_TIJ, self._gather(k_TJ, row), gate_TI)

    def _gather(self, local: Tensor, row: DecoderRow) -> Tensor:
        return gather_row(local, row.gathered_order_S, self.cp_group)

    def _attend_densely(
        self, heads: _Heads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor]:
        """Return out_THC and lse_TH, the log-sum-exp of each query's logits."""
        return dense_attention_with_lse(
            heads.q_THC,
            heads.k_SGC,
            heads.v_SGC,
            row.key_start_T,
            row.key_end_T,
            scale=self.head_dim**-0.5,
            kept=kept.outputs,
        )

    def _select(self, indexer: _IndexerHeads, row: DecoderRow, kept: KeptAttention) -> Tensor:
        """Return indices_TK, in the second pass of a recomputed layer those of the first one."""
        if kept.selection is not None:
            return kept.selection.unpack()
        indices_TK = lightning_indexer(
            indexer.q_TIJ.detach(),
            indexer.k_SJ.detach(),
            indexer.gate_TI.detach(),
            row.key_start_T,
            row.key_end_T,
            self.top_k,
        )
        if self.is_recomputed and not self._measures_indexer:
            kept.selection = PackedSelection.of(
                indices_TK, len(indexer.k_SJ), in_host_memory=self.in_host_memory
            )
        return indices_TK

    def _attend_sparsely(
        self, heads: _Heads, indexer: _IndexerHeads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor | None]:
        """Return out_THC and a loss that teaches the indexer, or None where it is not measured."""
        indices_TK = self._select(indexer, row, kept)
        row.meter.record("topk_indices", self.layer_number, indices_TK)
        operands = heads.q_THC, heads.k_SGC, heads.v_SGC, indices_TK
        options: dict[str, Any] = {"scale": self.head_dim**-0.5, "kept": kept.outputs}
        if not self._measures_indexer:
            out_THC, _ = sparse_attention(*operands, with_target=False, **options)
            return out_THC, None
        scores_TK = selected_indexer_scores(
            indexer.q_TIJ, indexer.k_SJ, indexer.gate_TI, indices_TK
        )
        out_THC, loss = sparse_attention_with_loss(
            *operands,
            scores_TK,
            row.kl_weights(),
            partial(row.meter_kl, self.layer_number),
            **options,
        )
        measure_recall(heads.q_THC, heads.k_SGC, indices_TK, row)
        return out_THC, loss

    def _attend_in_cache(self, heads: _Heads, hidden_SBD: Tensor, row: DecoderRow) -> Tensor:
        """Return out_THC of new tokens, whose keys are then in the cache."""
        assert row.cache is not None and self.cp_group.size() == 1, "a row's tokens are all here"
        new = NewHeads(q_THC=heads.q_THC, k_TGC=heads.k_SGC, v_TGC=heads.v_SGC)
        layer, ranges = row.cache.layers[self.layer_number - 1], (row.key_start_T, row.key_end_T)
        if row.phase != "sparse":
            return attend_densely(new, layer, row.cache, ranges)
        indexer = self._project_indexer(hidden_SBD, row)
        new_indexer = NewIndexerHeads(
            q_TIJ=indexer.q_TIJ, k_TJ=indexer.k_SJ, gate_TI=indexer.gate_TI
        )
        out_THC, indices_TK = attend_sparsely(
            new, new_indexer, layer, row.cache, ranges, top_k=self.top_k
        )
        row.meter.record("topk_indices", self.layer_number, indices_TK)
        return out_THC

    def _warm_up_indexer(
        self, heads: _Heads, indexer: _IndexerHeads, row: DecoderRow, kept: KeptAttention
    ) -> tuple[Tensor, Tensor | None]:
        """Return out_THC of dense attention and the indexer's loss over all keys, or None."""
        out_THC, lse_TH = self._attend_densely(heads, row, kept)
        if not self._measures_indexer:
            return out_THC, None
        loss, kl_TG = dense_indexer_loss(
            indexer.q_TIJ,
            indexer.k_SJ,
            indexer.gate_TI,
            heads.q_THC,
            heads.k_SGC,
            row.key_start_T,
            row.key_end_T,
            row.kl_weights(),
            lse_TH,
            scale=self.head_dim**-0.5,
        )
        row.meter_kl(self.layer_number, kl_TG)
        return out_THC, loss
