# SPDX-License-Identifier: Apache-2.0
"""The fused RMSNorm hands its kernels what they take, and gives back the shape that it got."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_keye.decoder.fused_norm import fused_rms_norm
from megatron_keye.decoder.norm import RMSNorm
from tests.support.numerics import assert_close, assert_norm_close, make_tensor

EPS = 1e-6


def forward(x: Tensor, weight: Tensor, eps: float, *options: Any) -> tuple[Tensor, None, Tensor]:
    assert options == (None, None, "its float64", 0, False)
    assert x.dim() == 2 and x.is_contiguous()
    inverse = (x.square().mean(1) + eps).rsqrt()
    return x * inverse[:, None] * weight, None, inverse


def backward(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    assert options == (0, False) and gradient.shape == x.shape and gradient.is_contiguous()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    with torch.enable_grad():
        normed = rms_norm(leaves[0], leaves[1].shape, leaves[1], EPS)
    return torch.autograd.grad(normed, leaves, gradient)  # type: ignore[return-value]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, constants = ModuleType("kernels"), ModuleType("constants")
    vars(kernels).update(rmsnorm_fwd=forward, rmsnorm_bwd=backward)
    vars(constants).update(TE_DType={torch.float64: "its float64"})
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", kernels)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.constants", constants)


@pytest.mark.parametrize("passes_gradients", [True, False])
def test_the_fused_form_is_the_plain_one(kernels: None, passes_gradients: bool) -> None:
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=8,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    results = []
    for is_fused in (False, True):
        norm = RMSNorm(config, 8, EPS, passes_gradients=passes_gradients, is_fused=is_fused)
        norm.weight.data.copy_(make_tensor(8, seed=1))
        wide = make_tensor(5, 3, 11, seed=2).requires_grad_()
        # Heads of a wider projection, as queries come, are not contiguous.
        normed = norm(wide[..., :8])
        (normed * make_tensor(5, 3, 8, seed=3)).sum().backward()
        results.append((normed, norm.weight.grad, wide.grad))
        assert list(norm.state_dict()) == ["weight"], "checkpoints have one key on every machine"
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine, theirs, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (77, 4, 128), (33, 1, 2048)])
def test_transformer_engines_kernels_equal_float64(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("transformer_engine_torch")
    x, weight = make_tensor(*shape, seed=1), make_tensor(shape[-1], seed=2)
    inputs = [tensor.to("cuda", dtype).requires_grad_() for tensor in (x, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weights = make_tensor(*shape, seed=3).cuda()
    got = fused_rms_norm(inputs[0], inputs[1], EPS)
    expected = rms_norm(exact[0], exact[1].shape, exact[1], EPS)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(got, expected, tolerance)
    mine = torch.autograd.grad(got, inputs, weights.to(dtype))
    theirs = torch.autograd.grad(expected, exact, weights.to(dtype).double())
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert_norm_close(gradient, wanted, tolerance)
