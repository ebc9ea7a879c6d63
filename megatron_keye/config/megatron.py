# SPDX-License-Identifier: Apache-2.0
"""Translates a run into Megatron-Core's configuration objects.

Megatron's field names appear in no other file of the configuration.
"""

import copy
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Recompute

BUCKET_ELEMENTS = 40_000_000
"""Gradients that are summed at once under the backward pass; Megatron-Core's own choice."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def weight_dtype(run: RunConfig) -> torch.dtype:
    """Return the dtype of weights and activations."""
    return _DTYPES[run.training.precision]


def decoder_config(run: RunConfig, *, on_gpu: bool, fusions: Fusions = PLAIN) -> TransformerConfig:
    """Translate the decoder's sizes and degrees.

    Args:
        run: The run.
        on_gpu: Whether modules are built on the GPU.
        fusions: The fused kernels that run.
    """
    decoder, degrees = run.model.decoder, run.parallel.decoder
    interleaved = degrees.virtual_stages > 1
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.num_kv_heads,
        kv_channels=decoder.head_dim,
        ffn_hidden_size=decoder.experts.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.rms_norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=decoder.experts.num_experts,
        moe_router_topk=decoder.experts.num_experts_per_token,
        moe_ffn_hidden_size=decoder.experts.intermediate_size,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=decoder.experts.balance_loss_weight,
        moe_router_pre_softmax=False,
        moe_router_dtype="fp64" if run.training.precision == "fp64" else "fp32",
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=fusions.permutation,
        # The fused router chooses by itself alone.
        moe_router_fusion=fusions.router and not run.post_training.replays_routes,
        tensor_model_parallel_size=degrees.tensor,
        pipeline_model_parallel_size=degrees.pipeline,
        virtual_pipeline_model_parallel_size=degrees.virtual_stages if interleaved else None,
        num_layers_in_first_pipeline_stage=degrees.first_stage_layers or None,
        num_layers_in_last_pipeline_stage=degrees.last_stage_layers or None,
        context_parallel_size=degrees.context,
        expert_model_parallel_size=degrees.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=degrees.tensor > 1,
        # With two stages both neighbours are the same rank, where batched P2P pairs up wrongly.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        params_dtype=weight_dtype(run),
        pipeline_dtype=weight_dtype(run),
        bf16=run.training.precision == "bf16",
        **_recomputation(run.training.recompute),
        # decoder/initialization.py draws weights by name afterwards, equally on every grid.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=fusions.weight_gradients,
        bias_dropout_fusion=False,
        bias_activation_fusion=fusions.swiglu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def output_layer_config(config: TransformerConfig, fusions: Fusions) -> TransformerConfig:
    """Return the configuration of the output layer, which is always Megatron-Core's own.

    Args:
        config: The decoder's, which stays as it is.
        fusions: The fused kernels that run.
    """
    own = copy.copy(config)
    own.gradient_accumulation_fusion = fusions.output_weight_gradients
    return own


def _recomputation(recompute: Recompute) -> dict[str, Any]:
    """Translate what is recomputed; "selective" is a whole layer that keeps its attention."""
    if recompute == "none":
        return {}
    if recompute == "experts":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def vision_config(run: RunConfig) -> TransformerConfig:
    """Translate the sizes of the ViT that Megatron's data-parallel wrapper and optimizer read."""
    vision = run.model.vision
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        calculate_per_token_loss=True,
        params_dtype=weight_dtype(run),
        bf16=run.training.precision == "bf16",
        gradient_accumulation_fusion=False,
    )


def data_parallel_config(
    run: RunConfig, *, overlaps: bool = False
) -> DistributedDataParallelConfig:
    """Translate the reduction of gradients over replicas.

    Args:
        run: The run.
        overlaps: Whether it runs under the backward pass, in buckets.
    """
    return DistributedDataParallelConfig(
        # Otherwise in the type of the weights, as float64 needs.
        grad_reduce_in_fp32=run.training.precision != "fp64",
        use_distributed_optimizer=run.training.distributes_optimizer,
        overlap_grad_reduce=overlaps,
        bucket_size=BUCKET_ELEMENTS if overlaps else None,
        check_for_nan_in_grad=False,
    )


def optimizer_config(run: RunConfig) -> MegatronOptimizerConfig:
    """Translate AdamW without clipping, which optim/ does by the norm over both grids."""
    optimizer = run.training.optimizer
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=0.0,
        use_distributed_optimizer=run.training.distributes_optimizer,
        bf16=run.training.precision == "bf16",
        params_dtype=weight_dtype(run),
    )
    # The distributed optimizer then makes no master weights of its own, and hands gradients over
    # in `decoupled_grad`. The setting that stands for this also asks for an optimizer that
    # optim/staged_adamw.py takes the place of.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = optimizer.is_staged
    return config
