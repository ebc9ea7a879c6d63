# SPDX-License-Identifier: Apache-2.0
"""Experts on two ranks equal experts on one, however unevenly tokens come and are routed."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_keye.config import FusionsConfig, RunConfig
from megatron_keye.config.backends import transformer_engine_version
from megatron_keye.config.fused_kernels import choose_fusions
from megatron_keye.config.megatron import decoder_config
from megatron_keye.decoder.initialization import initialize_weights
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.parallel.grid import build_grid
from tests.support.numerics import make_tensor
from tests.support.ranks import run_on_ranks
from tests.support.tiny import tiny_model, tiny_run

SIZE = (7, 1, 32)
"""Tokens, micro-batch and hidden size."""
NUM_LOCAL = {1: 4, 2: 2}
"""Experts of a rank, by number of ranks."""

ENGINE = {"linear_layers": "transformer_engine", "expert_layers": "transformer_engine"}

Results = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""Output, and gradients of the input, of the router's weight and of each expert's weights."""


def run_of(
    num_ranks: int, *, balance: float = 0.0, is_fused: bool = False, **training: object
) -> RunConfig:
    experts = replace(tiny_model().decoder.experts, balance_loss_weight=balance)
    wanted = "on" if is_fused else "off"
    # Weight gradients are added in place only to the buffers of a wrapped model.
    fusions = FusionsConfig(
        permutation=wanted, router=wanted, swiglu=wanted, norm=wanted, weight_gradients="off"
    )
    return tiny_run(
        model=tiny_model(experts=experts),
        training={"fusions": fusions, **training},
        data=num_ranks,
        expert=num_ranks,
    )


def _layer_on_rank(
    run_json: str, counts: tuple[int, ...], favoured: tuple[int, ...], device: str
) -> Results:
    """Run one expert layer on this rank's part of the tokens, forward and backward.

    Args:
        run_json: The run.
        counts: Tokens of each rank.
        favoured: The two experts that every token chooses; none for what random weights choose.
        device: "cpu" or "cuda".
    """
    run, rank = RunConfig.from_json(run_json), dist.get_rank()
    layer = _expert_layer(run, device)
    router = layer.router.weight
    if favoured:
        with torch.no_grad():
            router.fill_(-1.0)
            router[list(favoured)] = torch.tensor([[1.0], [0.5]]).to(router)
    tokens, weights = (
        make_tensor(*SIZE, seed=seed).split(counts)[rank].to(router) for seed in (3, 4)
    )
    tokens = tokens.abs().requires_grad_()
    output = layer(tokens)[0]
    (output * weights).sum().backward()
    # Without a schedule Megatron makes a scale of another shape, and keeps it for later tests.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    experts = expert_gradients(layer.experts, rank * NUM_LOCAL[len(counts)])
    parts = (output.detach(), tokens.grad, router.grad, experts)
    return tuple(_on_cpu(part) for part in parts)  # type: ignore[return-value]


def _expert_layer(run: RunConfig, device: str) -> Any:
    """Return the first layer's router and experts on this rank."""
    on_gpu = device == "cuda"
    engine = run.training.linear_layers == "transformer_engine"
    grid = build_grid(run.parallel)
    assert grid.decoder is not None, "every rank is the decoder's"
    fusions = choose_fusions(run.training, has_gpu=on_gpu, uses_transformer_engine=engine)
    config = decoder_config(run, on_gpu=on_gpu, fusions=fusions)
    stage = VirtualStage(
        run, config, grid.decoder, index=0, uses_transformer_engine=engine, fusions=fusions
    )
    sharded = stage.sharded_state_dict(metadata={"dp_cp_group": grid.decoder.dp_cp})
    initialize_weights(sharded, std=run.model.decoder.init_std, seed=run.training.seed)
    return stage.to(device).block.layers[0].mlp


def _on_cpu(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _on_cpu(each) for name, each in part.items()}
    return None if part is None else part.cpu()


def expert_gradients(experts: torch.nn.Module, first: int) -> dict[str, Tensor]:
    """Return each expert's gradients: a slice of stacked weights, or of linear_fc1.weight0."""
    gradients: dict[str, Tensor] = {}
    for name, weight in experts.named_parameters():
        found = re.fullmatch(r"linear_(fc[12])\.weight(\d*)", name)
        assert found is not None and weight.grad is not None, f"{name}: unknown or no gradient"
        own = [weight.grad] if found[2] else list(weight.grad)
        for index, gradient in enumerate(own, start=first + int(found[2] or 0)):
            gradients[f"expert {index} {found[1]}"] = gradient
    return gradients


def layer_on(
    run: RunConfig, counts: tuple[int, ...], favoured: tuple[int, ...], device: str = "cpu"
) -> Results:
    """Return output and gradients of all ranks together."""
    arguments = (run.to_json(), counts, favoured, device)
    parts = run_on_ranks(len(counts), _layer_on_rank, *arguments, device=device)
    outputs, inputs, routers, experts = zip(*parts, strict=True)
    together = {name: gradient for of_rank in experts for name, gradient in of_rank.items()}
    return torch.cat(outputs), torch.cat(inputs), sum(routers), together


def assert_same(got: Results, expected: Results, tolerance: float) -> None:
    close = {"rtol": tolerance, "atol": tolerance}
    for mine, theirs in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    assert got[3].keys() == expected[3].keys() and len(got[3]) == 8, "an expert is missing"
    for name, gradient in expected[3].items():
        torch.testing.assert_close(got[3][name], gradient, **close)


@pytest.mark.parametrize(
    ("counts", "precision", "balance", "favoured"),
    [
        ((7, 0), "fp32", 0.01, ()),
        ((0, 7), "fp64", 0.0, ()),
        ((4, 3), "fp32", 0.0, (0, 1)),
        ((7, 0), "fp64", 0.0, (3, 2)),
    ],
    ids=["no tokens on rank 1", "none on rank 0", "none for rank 1's experts", "all sent away"],
)
def test_a_rank_without_tokens_computes_its_part(
    counts: tuple[int, ...], precision: str, balance: float, favoured: tuple[int, ...]
) -> None:
    one, two = (run_of(number, balance=balance, precision=precision) for number in (1, 2))
    got = layer_on(two, counts, favoured)
    assert_same(got, layer_on(one, (7,), favoured), 1e-6 if precision == "fp32" else 1e-14)
    unused = [name for name in got[3] if favoured and int(name.split()[1]) not in favoured]
    assert len(unused) == (4 if favoured else 0)
    assert not any(got[3][name].any() for name in unused)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("layers", ["torch", "transformer_engine"])
@pytest.mark.parametrize(
    ("counts", "favoured"), [((7, 0), ()), ((4, 3), (0, 1)), ((7, 0), (3, 2))]
)
def test_a_gpu_without_tokens_computes_its_part(
    counts: tuple[int, ...], favoured: tuple[int, ...], layers: str
) -> None:
    if layers == "transformer_engine" and transformer_engine_version() is None:
        pytest.skip("no Transformer Engine")
    engine = {} if layers == "torch" else ENGINE
    one, two = (run_of(number, precision="fp32", **engine) for number in (1, 2))
    # Transformer Engine's products round float32 to TF32, 10 bits of mantissa.
    tolerance = 1e-5 if layers == "torch" else 5e-3
    expected = layer_on(one, (7,), favoured, "cuda")
    assert_same(layer_on(two, counts, favoured, "cuda"), expected, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.skipif(transformer_engine_version() is None, reason="no Transformer Engine")
def test_fused_experts_that_get_no_tokens_equal_plain_ones() -> None:
    expected = layer_on(run_of(1, precision="fp32", **ENGINE), (7,), (0, 1), "cuda")
    fused = run_of(2, is_fused=True, precision="fp32", **ENGINE)
    got = layer_on(fused, (4, 3), (0, 1), "cuda")
    assert_same(got, expected, 5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(transformer_engine_version() is None, reason="no Transformer Engine")
@pytest.mark.parametrize("is_fused", [False, True])
def test_the_host_waits_for_no_numbers_of_tokens(is_fused: bool) -> None:
    run = run_of(1, is_fused=is_fused, precision="bf16", linear_layers="transformer_engine")
    (waits_at,) = run_on_ranks(1, _place_of_waiting, run.to_json(), device="cuda")
    # Megatron's plain permutation splits by them on the host.
    assert waits_at == ("no_sync" if is_fused else "before_permutation_2")


def _place_of_waiting(run_json: str) -> str:
    layer = _expert_layer(RunConfig.from_json(run_json), "cuda")
    layer(make_tensor(*SIZE, seed=3).to(layer.router.weight))
    return str(layer.token_dispatcher.cuda_sync_point)
