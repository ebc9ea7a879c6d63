"""Where vision and decoder meet: what one rank owns of the whole model.

A decoder chunk embeds its tokens, lays vision features over their placeholders, and runs its
layers; the last one ends in the language loss.
"""

from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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

from megatron_keye.config.megatron import (
    data_parallel_config,
    decoder_config,
    vision_config,
    weight_dtype,
)
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.data.batch import Batch
from megatron_keye.decoder.cross_entropy import token_losses
from megatron_keye.decoder.initialization import initialize_weights
from megatron_keye.decoder.layer import block_spec
from megatron_keye.decoder.row import DecoderRow, RowMeter, rotary_tables
from megatron_keye.decoder.scatter import scatter_features
from megatron_keye.parallel.grid import Grid
from megatron_keye.vision import VisionTower


class DecoderChunk(MegatronModule):
    """The layers that one rank runs in one go: a pipeline stage, or a part of one."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        index: int,
        uses_transformer_engine: bool,
    ) -> None:
        """Build the chunk without filling its matrices.

        Args:
            run: The run.
            config: Megatron's view of it.
            groups: The decoder's process groups.
            index: Number of the chunk within its stage.
            uses_transformer_engine: Whether linears and experts are Transformer Engine's.
        """
        super().__init__(config=config)
        decoder, degrees = run.model.decoder, run.parallel.decoder
        stage, last = groups.pp.rank(), groups.pp.size() - 1
        self.run, self.tp_group = run, groups.tp
        self.pre_process = stage == 0 and index == 0
        self.post_process = stage == last and index == degrees.chunks_per_stage - 1
        self.vp_stage = index if degrees.chunks_per_stage > 1 else None
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
        num_layers = len(degrees.chunk_layers(decoder.num_layers, stage, index))
        self.block = TransformerBlock(
            config,
            block_spec(
                decoder,
                num_layers,
                uses_transformer_engine=uses_transformer_engine,
                only_indexers_learn=run.training.only_indexers_learn,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                decoder.hidden_size, decoder.vocab_size, bias=False, gather_output=False, **build
            )
            # It gets the labelled tokens of the whole sequence instead of a part of the sequence.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = groups.tp.size() > 1

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the previous stage sent; called by Megatron's schedules."""
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
        """Run this chunk's layers on one row.

        Args:
            batch: The row's tensors.
            features_MD: [M, D] vision features of this rank's placeholders, for the first chunk.
            indexer_loss_weight: What one query's KL weighs beside one token's language loss.
            meter: Where layers report.
            where: Rank and samples, for messages.
            phase: Which attention and which indexer loss run.

        Returns:
            The sum of the language loss over this rank's labels from the last chunk, a scalar;
            hidden states [S/CP/TP, 1, D] from any other.
        """
        hidden_SBD = None
        if self.pre_process:
            assert features_MD is not None, "the first chunk takes vision features"
            hidden_SBD = self._embed(batch, features_MD, where)
        hidden_SBD = self.block(
            hidden_SBD,
            attention_mask=None,
            packed_seq_params=self._row(batch, indexer_loss_weight, meter, phase),
        )
        return self._loss(hidden_SBD, batch) if self.post_process else hidden_SBD

    def logits(self, hidden_LBD: Tensor) -> Tensor:
        """Return this tensor rank's part of the logits.

        Args:
            hidden_LBD: [L, 1, D] final hidden states, whole over the tensor axis.

        Returns:
            [L, 1, V/TP].
        """
        return cast(Tensor, self.output_layer(hidden_LBD)[0])

    def _embed(self, batch: Batch, features_MD: Tensor, where: str) -> Tensor:
        embeddings = self.embedding(batch.token_ids_BS)
        if not self.config.sequence_parallel:
            embeddings = embeddings.transpose(0, 1).contiguous()
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # With a frozen embedding, gradients must still flow to features and indexers.
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
            attention_rotary=attention,
            indexer_rotary=indexer,
            phase=phase,
            indexer_loss_weight=indexer_loss_weight,
            meter=meter,
        )

    def _loss(self, hidden_SBD: Tensor, batch: Batch) -> Tensor:
        """Add up the loss of labelled tokens; only these get logits.

        A long video has a hundred times more tokens than its answer, and logits are as wide as the
        vocabulary.
        """
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(
                hidden_SBD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden_LBD = hidden_SBD.index_select(0, batch.label_positions_L)
        loss_LB = token_losses(self.logits(hidden_LBD), batch.labels_L[:, None], self.tp_group)
        return loss_LB.sum()


@dataclass(frozen=True)
class KeyeModel:
    """What one rank owns of the model, wrapped for adding up gradients over replicas."""

    chunks: list[DistributedDataParallel]
    """Decoder chunks in pipeline order; empty on a dedicated vision rank."""
    vision: DistributedDataParallel | None
    """ViT and projector; None on a rank that does not encode."""

    def wrapped(self) -> list[DistributedDataParallel]:
        """Return all that this rank owns."""
        return [*self.chunks, *([self.vision] if self.vision is not None else [])]


def build_model(
    run: RunConfig, grid: Grid, device: torch.device, *, uses_transformer_engine: bool
) -> KeyeModel:
    """Build and initialise what this rank owns; equal for every grid.

    Args:
        run: The run.
        grid: Groups of this rank.
        device: Where the weights live.
        uses_transformer_engine: Whether linears and experts are Transformer Engine's.
    """
    chunks: list[DistributedDataParallel] = []
    if grid.decoder is not None:
        config = decoder_config(
            run, on_gpu=device.type == "cuda", grouped_experts=uses_transformer_engine
        )
        for index in range(run.parallel.decoder.chunks_per_stage):
            chunk = DecoderChunk(
                run,
                config,
                grid.decoder,
                index=index,
                uses_transformer_engine=uses_transformer_engine,
            )
            sharded = chunk.sharded_state_dict(metadata={"dp_cp_group": grid.decoder.dp_cp})
            initialize_weights(sharded, std=run.model.decoder.init_std, seed=run.training.seed)
            _freeze(chunk, run, part="decoder")
            chunks.append(_wrap(chunk.to(device), run, config, grid.decoder))
    return KeyeModel(chunks=chunks, vision=_build_vision(run, grid, device))


def _build_vision(
    run: RunConfig, grid: Grid, device: torch.device
) -> DistributedDataParallel | None:
    if grid.vision is None:
        return None
    tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    tower.reset_parameters(run.training.seed)
    _freeze(tower.encoder, run, part="vision")
    _freeze(tower.projector, run, part="projector")
    tower = tower.to(device=device, dtype=weight_dtype(run))
    return _wrap(tower, run, vision_config(run), grid.vision)


def _freeze(module: torch.nn.Module, run: RunConfig, *, part: str) -> None:
    """Keep what does not learn in this run from learning, indexers apart from their layers."""
    for name, parameter in module.named_parameters():
        owner = "indexer" if ".indexer." in name else part
        if owner not in run.training.trained_parts:
            parameter.requires_grad_(False)


def _wrap(
    module: torch.nn.Module,
    run: RunConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
) -> DistributedDataParallel:
    replicas = data_parallel_config(run)
    layout = None
    if replicas.use_distributed_optimizer:
        layout = DistributedOptimizer.compute_full_param_layout(
            [weight for weight in module.parameters() if weight.requires_grad],
            None,  # One bucket: gradients are not reduced while the backward pass runs.
            groups.dp_cp.size(),
            replicas,
            expert_data_parallel_world_size=groups.expt_dp.size(),
        )
    return DistributedDataParallel(
        config,
        replicas,
        module,
        disable_bucketing=True,
        pg_collection=groups,
        full_param_layout=layout,
    )
