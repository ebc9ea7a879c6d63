# SPDX-License-Identifier: Apache-2.0
"""The decoder's layers of one virtual pipeline stage.

The first one also embeds tokens and scatters vision features; the last one computes the loss.
"""

from dataclasses import replace
from typing import cast

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.profiler import record_function

from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.megatron import output_layer_config
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.decoder.batch import Batch
from megatron_keye.decoder.cross_entropy import token_losses
from megatron_keye.decoder.key_cache import RowCache
from megatron_keye.decoder.layer import block_spec
from megatron_keye.decoder.policy import policy_weights
from megatron_keye.decoder.row import DecoderRow, RowMeter, rotary_tables
from megatron_keye.decoder.scatter import scatter_features


class VirtualStage(MegatronModule):
    """A pipeline stage, or a part of an interleaved one (Megatron-Core's model chunk)."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        index: int,
        uses_transformer_engine: bool,
        fusions: Fusions = PLAIN,
    ) -> None:
        """Build the stage; its matrices are initialised later.

        Args:
            run: The run.
            config: Megatron's configuration of the run.
            groups: The decoder's process groups.
            index: Number of the virtual stage within its pipeline stage.
            uses_transformer_engine: Whether linears are Transformer Engine's.
            fusions: The fused kernels that run; those of `config`.
        """
        super().__init__(config=config)
        decoder, degrees = run.model.decoder, run.parallel.decoder
        stage, last = groups.pp.rank(), groups.pp.size() - 1
        self.run, self.tp_group, self.cp_group = run, groups.tp, groups.cp
        self.pre_process = stage == 0 and index == 0
        self.post_process = stage == last and index == degrees.virtual_stages - 1
        self.vp_stage = index if degrees.virtual_stages > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        build = {"config": config, "init_method": config.init_method, "tp_group": groups.tp}
        if self.pre_process:
            self.embedding = VocabParallelEmbedding(
                decoder.vocab_size,
                decoder.hidden_size,
                reduce_scatter_embeddings=config.sequence_parallel,
                **build,
            )
        num_layers = len(degrees.virtual_stage_layers(decoder.num_layers, stage, index))
        self.block = TransformerBlock(
            config,
            block_spec(
                decoder,
                num_layers,
                uses_transformer_engine=uses_transformer_engine,
                fuses_norm=fusions.norm,
                training=run.training,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            build["config"] = output_layer_config(config, fusions)
            self.output_layer = ColumnParallelLinear(
                decoder.hidden_size, decoder.vocab_size, bias=False, gather_output=False, **build
            )
            # Its input is the labelled tokens of the whole sequence, not a part of the sequence.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = groups.tp.size() > 1

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Set the input from the previous stage; called by Megatron's schedules."""
        self.block.set_input_tensor(input_tensor[0])

    def forward(
        self,
        batch: Batch,
        features_MD: Tensor | None,
        *,
        indexer_loss_weight: float,
        meter: RowMeter,
        where: str,
        phase: Phase,
    ) -> Tensor:
        """Run this stage's layers on one row.

        Args:
            batch: The row's tensors.
            features_MD: [M, D] vision features of this rank's placeholders; None but in the first.
            indexer_loss_weight: Weight of one query's KL relative to one token's language loss.
            meter: Receives the layers' measurements.
            where: Rank and samples, for error messages.
            phase: Which attention and which indexer loss run.

        Returns:
            In the last stage the weighted language loss summed over this rank's labels, a scalar;
            in others hidden states [S/CP/TP, 1, D].
        """
        row = self._row(batch, indexer_loss_weight, meter, phase)
        hidden_SBD = self._run_layers(batch, features_MD, row, where)
        return self._loss(hidden_SBD, batch, meter) if self.post_process else hidden_SBD

    def final_states(
        self,
        batch: Batch,
        features_MD: Tensor,
        cache: RowCache,
        *,
        meter: RowMeter,
        where: str,
        phase: Phase,
    ) -> Tensor:
        """Run new tokens through all layers of a decoder without pipeline stages.

        Args:
            batch: The tokens; logits are wanted at its label positions.
            features_MD: [M, D] vision features of this rank's placeholders.
            cache: Receives the tokens' keys, and has those of the tokens before them.
            meter: Receives the layers' measurements.
            where: Rank and samples, for error messages.
            phase: Which attention runs; the warm-up attends as "dense".

        Returns:
            Final hidden states [L, 1, D], equal on all tensor ranks, for `logits`.
        """
        assert self.pre_process and self.post_process, "only a whole decoder generates"
        row = replace(self._row(batch, 0.0, meter, phase), cache=cache)
        return self._labelled(self._run_layers(batch, features_MD, row, where), batch)

    def logits(self, hidden_LBD: Tensor) -> Tensor:
        """Return this tensor rank's part of the logits.

        Args:
            hidden_LBD: [L, 1, D] final hidden states, equal on all tensor ranks.

        Returns:
            [L, 1, V/TP].
        """
        return cast(Tensor, self.output_layer(hidden_LBD)[0])

    def _run_layers(
        self, batch: Batch, features_MD: Tensor | None, row: DecoderRow, where: str
    ) -> Tensor:
        hidden_SBD = None
        if self.pre_process:
            assert features_MD is not None, "the first stage needs vision features"
            hidden_SBD = self._embed(batch, features_MD, where)
        # Megatron's block passes this argument to every layer without reading it, so it can carry
        # the row to the attention.
        hidden: Tensor = self.block(hidden_SBD, attention_mask=None, packed_seq_params=row)
        return hidden

    @record_function("embedding")
    def _embed(self, batch: Batch, features_MD: Tensor, where: str) -> Tensor:
        embeddings = self.embedding(batch.token_ids_BS)
        if not self.config.sequence_parallel:
            embeddings = embeddings.transpose(0, 1).contiguous()
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # With a frozen embedding, gradients must still reach features and indexers.
            embeddings.requires_grad_()
        return scatter_features(embeddings, features_MD, batch.feature_positions_M, where=where)

    def _row(
        self, batch: Batch, indexer_loss_weight: float, meter: RowMeter, phase: Phase
    ) -> DecoderRow:
        attention, indexer = rotary_tables(
            batch.position_ids_3T, self.run.model.decoder, self.config.params_dtype
        )
        return DecoderRow(
            key_start_T=batch.key_start_T,
            key_end_T=batch.key_end_T,
            is_real_T=batch.is_real_T,
            gathered_order_S=batch.gathered_order_S,
            key_reach_S=batch.key_reach_S,
            num_paths_T=batch.num_paths_T,
            routes=batch.routes,
            attention_rotary=attention,
            indexer_rotary=indexer,
            phase=phase,
            indexer_loss_weight=indexer_loss_weight,
            meter=meter,
        )

    @record_function("vocabulary")
    def _loss(self, hidden_SBD: Tensor, batch: Batch, meter: RowMeter) -> Tensor:
        """Sum the loss of labelled tokens, each times its weight.

        Only these get logits, which are as wide as the vocabulary: a long video has a hundred
        times more tokens than its answer. In policy training weights depend on log-probabilities,
        which are those of the law that generates.
        """
        logits_LBV = self.logits(self._labelled(hidden_SBD, batch))
        temperature = self.run.rollout.temperature if batch.answers is not None else 1.0
        if temperature != 1:
            wide = torch.promote_types(logits_LBV.dtype, torch.float32)
            logits_LBV = logits_LBV.to(wide) / temperature
        loss_LB = token_losses(logits_LBV, batch.labels_L[:, None], self.tp_group)
        if batch.answers is None:
            return (loss_LB * batch.weights_L[:, None]).sum()
        log_probs_L = -loss_LB.detach().squeeze(1)
        meter.log_probs.append((batch.answers.places_L, log_probs_L))
        weights_L = policy_weights(
            log_probs_L,
            batch.answers,
            batch.weights_L,
            settings=self.run.post_training,
            cp_group=self.cp_group,
        )
        return (loss_LB.squeeze(1) * weights_L).sum()

    def _labelled(self, hidden_SBD: Tensor, batch: Batch) -> Tensor:
        """Return the states [L, 1, D] at label positions, on all tensor ranks."""
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(
                hidden_SBD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_SBD.index_select(0, batch.label_positions_L)
