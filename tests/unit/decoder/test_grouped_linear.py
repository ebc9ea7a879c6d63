# SPDX-License-Identifier: Apache-2.0
"""One product for all experts equals one for each, in values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_keye.config.lora import LoraConfig
from megatron_keye.config.megatron import decoder_config
from megatron_keye.decoder.grouped_linear import (
    GroupedLinear,
    grouped_product,
    plain_grouped_product,
)
from tests.support.numerics import assert_close, make_tensor
from tests.support.tiny import tiny_run

NUM_ROWS = (3, 0, 4, 0)


def ends(*num_rows: int) -> Tensor:
    return torch.tensor(num_rows).cumsum(0, dtype=torch.int32)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = make_tensor(*output.shape, seed=9).to(output.dtype)
    return torch.autograd.grad(output, inputs, weights)


@pytest.mark.parametrize(
    ("dtype", "num_inputs"),
    [(torch.float32, 8), (torch.bfloat16, 8), (torch.float64, 8), (torch.bfloat16, 12)],
    ids=["fp32", "bf16", "fp64", "bf16 without alignment"],
)
def test_a_grouped_product_is_one_of_each_expert(dtype: torch.dtype, num_inputs: int) -> None:
    hidden = make_tensor(sum(NUM_ROWS), num_inputs, seed=1).to(dtype).requires_grad_()
    weight = make_tensor(len(NUM_ROWS), 16, num_inputs, seed=2).to(dtype).requires_grad_()
    got = grouped_product(hidden, weight, ends(*NUM_ROWS))
    parts = zip(hidden.split(NUM_ROWS), weight, strict=True)
    expected = torch.cat([rows @ matrix.T for rows, matrix in parts])
    assert torch.equal(got, expected)
    assert torch.equal(got, plain_grouped_product(hidden, weight, ends(*NUM_ROWS)))
    for mine, theirs in zip(
        gradients(got, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_gradient_of_a_sum_is_taken() -> None:
    hidden = make_tensor(4, 8, seed=1).float()
    weight = make_tensor(2, 8, 8, seed=2).float().requires_grad_()
    grouped_product(hidden, weight, ends(1, 3)).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], hidden[:1].expand(8, -1))


def test_without_rows_every_weight_has_a_gradient_of_zeros() -> None:
    hidden = torch.empty(0, 8, requires_grad=True)
    weight = make_tensor(2, 8, 8, seed=2).float().requires_grad_()
    output = grouped_product(hidden, weight, ends(0, 0))
    of_hidden, of_weight = gradients(output, hidden, weight)
    assert output.shape == of_hidden.shape == (0, 8)
    assert of_weight.shape == weight.shape and not of_weight.any()


def test_each_expert_has_an_adapter_of_its_own() -> None:
    lora = LoraConfig(rank=2, alpha=6.0, targets=("experts",))
    run = tiny_run(training={"precision": "fp64"}, data=2, expert=2)
    config = decoder_config(run, on_gpu=False)
    layer = GroupedLinear(len(NUM_ROWS), 5, 4, config=config, lora=lora)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        parameter.data = make_tensor(*parameter.shape, seed=10 + number)
        assert parameter.allreduce is False, name
    hidden = make_tensor(sum(NUM_ROWS), 5, seed=1)
    output = layer(hidden, ends(*NUM_ROWS))
    merged = layer.weight + 3.0 * layer.lora_b @ layer.lora_a
    assert_close(output, plain_grouped_product(hidden, merged, ends(*NUM_ROWS)), 1e-12)
    output.sum().backward()
    assert not layer.lora_a.grad[1].any() and layer.lora_a.grad[2].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_rows", [0, 3, 4096])
def test_the_kernel_of_a_gpu_is_a_loop_over_experts(num_rows: int) -> None:
    """Also with experts that have no rows, without a wait of the host, and bit for bit again."""
    generator = torch.Generator().manual_seed(num_rows)
    experts = torch.randint(0, 100, (num_rows,), generator=generator)
    counts = torch.bincount(experts, minlength=128)
    assert (counts == 0).any(), "some expert has no rows"
    places = counts.cumsum(0, dtype=torch.int32).cuda()
    hidden, weight = (
        make_tensor(*shape, seed=seed).bfloat16().cuda().requires_grad_()
        for seed, shape in enumerate([(num_rows, 256), (128, 384, 256)])
    )
    slope = make_tensor(num_rows, 384, seed=2).bfloat16().cuda()

    def results(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        output = of(hidden, weight, places)
        return output, *torch.autograd.grad(output, (hidden, weight), slope)

    results(grouped_product)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = results(grouped_product), results(grouped_product)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, repeated, theirs in zip(got, again, results(plain_grouped_product), strict=True):
        assert torch.equal(mine, repeated)
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-2 * 256**0.5)
    assert not got[2][counts == 0].any(), "experts without rows have a gradient of zeros"
