# SPDX-License-Identifier: Apache-2.0
"""The two stacks of layers that tools/benchmark_step.py times, ours and plain Megatron-Core's.

Both have the same widths, experts, precision, gradient buffers and optimizer, and random weights
that are drawn on the device. Plain means dense causal attention by Transformer Engine, or by
Megatron-Core's own layers where that is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.megatron import (
    decoder_config,
    optimizer_config,
    weight_dtype,
)
from megatron_keye.decoder.layer import block_spec
from megatron_keye.decoder.row import DecoderRow, RowMeter, rotary_tables
from megatron_keye.kernels.union_lists import union_lists
from megatron_keye.model import part_of, wrap
from megatron_keye.optim.overlapped_sum import OverlappedSum
from megatron_keye.parallel.context import gathered_order
from megatron_keye.plan.places import owned_positions
from tools.benchmark_step_cases import PEER_RECOMPUTES, Case

SEGMENT_TOKENS = 64
NOISE = 0.05


@dataclass
class Stack:
    """Layers with their optimizer."""

    module: DistributedDataParallel
    optimizer: MegatronOptimizer
    sums: OverlappedSum
    """Of its gradients over ranks, where they run under the backward pass."""
    run_forward: Callable[[Tensor], Tensor]
    """Hidden states [S/CP, 1, D] to hidden states."""

    def clear_gradients(self) -> None:
        """Forget the gradients of the last step."""
        self.sums.begin_step()
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Update all weights that learn."""
        self.sums.start_rest()
        self.module.finish_grad_sync()
        self.optimizer.step()

    def let_go(self) -> None:
        """Free everything: autograd's hooks hold the wrapper in a cycle through C++."""
        vars(self.module).clear()


class UnionMeter(RowMeter):
    """A meter that measures how many keys 16 neighbouring queries select together."""

    union_keys: float = 0.0
    """Mean over the last layer's tiles."""

    def record(self, name: str, layer_number: int, value: Tensor) -> None:
        """Measure a layer's selection."""
        if name == "topk_indices":
            counts_B = union_lists(value, len(value)).counts_B
            self.union_keys = float(counts_B.double().mean())


def own_positions(case: Case, groups: ProcessGroupCollection, device: torch.device) -> Tensor:
    """Return the row positions of this rank's tokens, int64 [S/CP]."""
    positions = owned_positions(case.tokens, groups.cp.size(), groups.cp.rank())
    return torch.from_numpy(positions).to(device)


def hidden_states(
    case: Case, run: RunConfig, groups: ProcessGroupCollection, device: torch.device
) -> Tensor:
    """Return random hidden states [S/CP, 1, D] that need a gradient."""
    generator = torch.Generator(device).manual_seed(run.training.seed)
    shape = (case.tokens, 1, run.model.decoder.hidden_size)
    options: dict[str, Any] = {"generator": generator, "device": device}
    hidden_SBD = torch.randn(shape, **options)
    if case.locality == "segments":
        noise_SBD = NOISE * hidden_SBD
        segments = torch.randn((-(-case.tokens // SEGMENT_TOKENS), *shape[1:]), **options)
        hidden_SBD = segments.repeat_interleave(SEGMENT_TOKENS, dim=0)[: case.tokens] + noise_SBD
    own_SBD = hidden_SBD[own_positions(case, groups, device)]
    return own_SBD.to(weight_dtype(run)).requires_grad_()


def decoder_row(
    case: Case,
    run: RunConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    meter: RowMeter,
) -> DecoderRow:
    """Return this rank's row of a case: causal documents of text, without padding."""
    trees, position_T = case.branches(), own_positions(case, groups, device)

    def to_tokens(of_branches: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.repeat(of_branches, trees.lengths)).to(device)[position_T]

    documents = np.maximum.accumulate(np.where(trees.parents < 0, trees.bounds[:-1], 0))
    ids_3T = (position_T - to_tokens(trees.bounds[:-1] - trees.num_earlier)).expand(3, -1)
    is_branched = case.layout == "answers"
    attention, indexer = rotary_tables(ids_3T, run.model.decoder, weight_dtype(run))
    return DecoderRow(
        key_start_T=to_tokens(documents),
        key_end_T=position_T + 1,
        key_reach_S=torch.from_numpy(trees.key_reach).to(device) if is_branched else None,
        num_paths_T=torch.from_numpy(trees.num_paths).to(device)[position_T]
        if is_branched
        else None,
        is_real_T=torch.ones_like(position_T, dtype=torch.bool),
        gathered_order_S=gathered_order(case.tokens, groups.cp.size()).to(device),
        attention_rotary=attention,
        indexer_rotary=indexer,
        phase=run.training.phase,
        indexer_loss_weight=run.training.indexer_loss_weight,
        meter=meter,
    )


def our_stack(
    case: Case,
    run: RunConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    fusions: Fusions,
    *,
    uses_transformer_engine: bool,
) -> Stack:
    """Return our layers."""
    config = decoder_config(run, on_gpu=device.type == "cuda", fusions=fusions)
    training, decoder = run.training, run.model.decoder
    spec = block_spec(
        decoder,
        decoder.num_layers,
        uses_transformer_engine=uses_transformer_engine,
        fuses_norm=fusions.norm,
        training=training,
    )
    block = TransformerBlock(config, spec, post_process=False, pg_collection=groups)
    for name, weight in block.named_parameters():
        weight.requires_grad_(training.is_trained(part_of(name), is_adapter=False))
    row = decoder_row(case, run, groups, device, RowMeter())

    def forward(hidden_SBD: Tensor) -> Tensor:
        fresh = replace(row, meter=RowMeter(), kept={})
        hidden: Tensor = stack.module(hidden_SBD, attention_mask=None, packed_seq_params=fresh)
        return hidden

    stack = _stack(block, run, config, groups, device, forward)
    return stack


def plain_stack(
    case: Case,
    run: RunConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    fusions: Fusions,
    *,
    uses_transformer_engine: bool,
    fuses_rotary: bool,
) -> Stack:
    """Return plain Megatron-Core's layers, which attend densely."""
    on_gpu, decoder = device.type == "cuda", run.model.decoder
    kept = replace(run, training=replace(run.training, recompute="none"))
    config = decoder_config(kept, on_gpu=on_gpu, fusions=fusions)
    if modules := PEER_RECOMPUTES[case.recompute]:
        config.recompute_granularity, config.recompute_modules = "selective", modules
        if not uses_transformer_engine:
            # Megatron-Core recomputes a norm only where Transformer Engine is installed.
            config.recompute_modules = ["moe"]
    config.apply_rope_fusion = fuses_rotary and uses_transformer_engine
    block = TransformerBlock(
        config,
        _plain_spec(config, decoder.num_layers, uses_transformer_engine),
        post_process=False,
        pg_collection=groups,
    )
    rotary = RotaryEmbedding(
        decoder.head_dim,
        rotary_percent=1.0,
        rotary_base=int(decoder.rope_theta),
        use_cpu_initialization=not on_gpu,
        cp_group=groups.cp,
    )
    lengths = case.document_lengths()
    frequencies, packed = rotary(max(lengths)), _packed(lengths, device)

    def forward(hidden_SBD: Tensor) -> Tensor:
        hidden: Tensor = stack.module(
            hidden_SBD,
            attention_mask=None,
            rotary_pos_emb=frequencies,
            packed_seq_params=packed,
        )
        return hidden

    stack = _stack(block, run, config, groups, device, forward)
    return stack


def _plain_spec(
    config: TransformerConfig, num_layers: int, uses_transformer_engine: bool
) -> TransformerBlockSubmodules:
    options: dict[str, Any] = {"num_experts": config.num_moe_experts, "qk_layernorm": True}
    if uses_transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_submodules(moe_grouped_gemm=True, **options)
    else:
        layer = get_gpt_layer_local_submodules(normalization="RMSNorm", **options)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers)


def _packed(lengths: list[int], device: torch.device) -> PackedSeqParams | None:
    if len(lengths) == 1:
        return None
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _stack(
    block: TransformerBlock,
    run: RunConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    forward: Callable[[Tensor], Tensor],
) -> Stack:
    """Draw weights, and wrap the layers as a run does."""
    generator = torch.Generator(device).manual_seed(run.training.seed)
    block = block.to(device)
    for weight in block.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, run.model.decoder.init_std, generator=generator)
    wrapped = wrap(block, run, config, groups, may_overlap=True)
    optimizer = get_megatron_optimizer(
        optimizer_config(run), [wrapped], use_gloo_process_groups=False, pg_collection=groups
    )
    overlapped = [wrapped] if wrapped.ddp_config.overlap_grad_reduce else []
    return Stack(wrapped, optimizer, OverlappedSum(overlapped), forward)
