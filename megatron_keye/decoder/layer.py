# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's specs of the decoder's layers.

Linear layers are Transformer Engine's or Megatron's own, experts Transformer Engine's or this
package's; norms and attention are always this package's. Checkpoints have the same keys.
"""

from collections.abc import Callable
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_keye.config.backends import has_engine_experts
from megatron_keye.config.model import DecoderConfig
from megatron_keye.config.training import TrainingConfig
from megatron_keye.decoder.adapters import adapt_column, adapt_experts, adapt_row
from megatron_keye.decoder.attention import AttentionLinears, SparseSelfAttention
from megatron_keye.decoder.grouped_experts import GroupedExpertLayer, GroupedExperts
from megatron_keye.decoder.norm import RMSNorm
from megatron_keye.decoder.router import Router
from megatron_keye.decoder.row import DecoderRow


class DecoderLayer(TransformerLayer):
    """Megatron's layer, which tells its router of the tokens whose experts are known."""

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: None = None,
        padding_mask: None = None,
        packed_seq_params: DecoderRow | None = None,
    ) -> Tensor:
        """Run norm, router and experts; called by Megatron's layer.

        Args:
            hidden_states: [S/CP/TP, 1, D].
            inference_context: None.
            padding_mask: None. Under this name Megatron hands a mask to the router, also where it
                computes experts again, and does nothing else with it: here it has the experts.
            packed_seq_params: The row.
        """
        routes = packed_seq_params.routes if packed_seq_params is not None else None
        known_ES = None
        if routes is not None:
            known_ES = routes.of_layer(self.layer_number, self.config.num_moe_experts)
        hidden: Tensor = super()._forward_mlp(hidden_states, inference_context, known_ES)
        return hidden


def block_spec(
    decoder: DecoderConfig,
    num_layers: int,
    *,
    uses_transformer_engine: bool,
    fuses_norm: bool,
    training: TrainingConfig,
) -> TransformerBlockSubmodules:
    """Return the spec of `num_layers` equal layers and the final norm.

    Args:
        decoder: Sizes.
        num_layers: Layers of one virtual stage.
        uses_transformer_engine: Whether linears are Transformer Engine's.
        fuses_norm: Whether Transformer Engine computes the norms.
        training: What learns, which linears have adapters, what is recomputed, and whose experts
            they are. Where only indexers learn, the residual stream alone has a backward pass, to
            reach the attached losses; attention and experts have none and save no activations.
    """
    lora = training.lora
    plain_norm = partial(RMSNorm, is_fused=fuses_norm)
    norm = partial(plain_norm, passes_gradients=not training.only_indexers_learn)
    backend = _backend(uses_transformer_engine)
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    if lora.is_adapting("attention"):
        column, row = adapt_column(column, lora), adapt_row(row, lora)
    attention = ModuleSpec(
        module=SparseSelfAttention,
        params={
            "decoder": decoder,
            "recompute": training.recompute,
            "keeps_in_host_memory": training.keeps_in_host_memory,
            "norm": plain_norm,
        },
        submodules=AttentionLinears(column=column, row=row),
    )
    layer = ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_expert_layer(training, uses_transformer_engine=uses_transformer_engine),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=plain_norm)


def _expert_layer(
    training: TrainingConfig, *, uses_transformer_engine: bool
) -> Callable[..., MoELayer]:
    lora = training.lora if training.lora.is_adapting("experts") else None
    if not has_engine_experts(training, uses_transformer_engine=uses_transformer_engine):
        experts = partial(GroupedExperts, lora=lora)
        submodules = MoESubmodules(router=Router, experts=experts)
        return partial(GroupedExpertLayer, submodules=submodules)
    engine = _backend(uses_transformer_engine=True).grouped_mlp_modules(True)
    if lora is not None:
        engine = adapt_experts(engine, lora)
    return partial(MoELayer, submodules=MoESubmodules(router=Router, experts=engine))


def _backend(uses_transformer_engine: bool) -> BackendSpecProvider:
    if not uses_transformer_engine:
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
