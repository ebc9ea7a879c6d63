# SPDX-License-Identifier: Apache-2.0
"""The indexer's projections with and without rounding to 8 bits."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_keye.config import IndexerConfig
from megatron_keye.decoder.indexer import Indexer
from megatron_keye.decoder.positions import rotary_table
from megatron_keye.kernels.indexer_quantization import round_to_fp8

NUM_TOKENS, WIDTH = 7, 24


def run_indexer(quantization: str, hidden_TD: Tensor) -> tuple[Indexer, tuple[Tensor, ...]]:
    """Return an indexer of fixed weights and what it makes of the hidden states."""
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=1, use_cpu_initialization=True
    )
    sizes = IndexerConfig(num_heads=3, head_dim=16, top_k=4, quantization=quantization)
    torch.manual_seed(1)
    indexer = Indexer(config, sizes)
    ids = torch.arange(NUM_TOKENS).expand(3, -1)
    return indexer, indexer(hidden_TD, rotary_table(ids, 16, (2, 3, 3), theta=10_000.0))


def test_rounding_comes_after_the_rotary_and_leaves_the_gates() -> None:
    hidden_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    _, (q_TIJ, k_TJ, gate_TI) = run_indexer("none", hidden_TD)
    _, (rounded_TIJ, rounded_TJ, same_TI) = run_indexer("fp8", hidden_TD)
    assert torch.equal(rounded_TIJ, round_to_fp8(q_TIJ)), "queries"
    assert torch.equal(rounded_TJ, round_to_fp8(k_TJ)), "keys"
    assert torch.equal(same_TI, gate_TI), "gates"


def test_weights_learn_through_the_rounding() -> None:
    hidden_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    gradients = []
    for quantization in ("none", "fp8"):
        indexer, (q_TIJ, k_TJ, _) = run_indexer(quantization, hidden_TD)
        products_TI = torch.einsum("tij,tj->ti", q_TIJ, k_TJ)
        weights = indexer.q_proj.weight, indexer.k_proj.weight
        gradients.append(torch.autograd.grad(products_TI.square().sum(), weights))
    for plain, rounded in zip(*gradients, strict=True):
        error = float((rounded - plain).norm() / plain.norm())
        assert 0 < error < 0.1, f"error {error}: close to the gradient without rounding"


def test_widths_that_cannot_be_rotated_are_refused() -> None:
    IndexerConfig(num_heads=3, head_dim=12, top_k=4)
    with pytest.raises(ValueError, match="head_dim.*12.*a power of two with quantization = fp8"):
        IndexerConfig(num_heads=3, head_dim=12, top_k=4, quantization="fp8")
    with pytest.raises(ValueError, match="quantization.*int4.*none or fp8"):
        IndexerConfig(num_heads=3, head_dim=16, top_k=4, quantization="int4")
