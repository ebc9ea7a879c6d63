# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's rounding to 8 bits."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_keye.kernels.indexer_quantization import (
    dequantize,
    quantize,
    round_to_fp8,
    split_rounded,
)
from tests.support.numerics import assert_close, device, make_tensor

NUM_VECTORS = 37
LARGEST = 448
"""The largest e4m3 number."""


def make_vectors(num_channels: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Return vectors of many sizes, of zeros, of less than the floor, and with one large entry."""
    sizes = torch.logspace(-6, 6, NUM_VECTORS, dtype=torch.float64)
    vectors = make_tensor(NUM_VECTORS, num_channels, seed=seed) * sizes[:, None]
    vectors[1], vectors[2] = 0, 1e-7
    vectors[3, 0] = 1000
    return vectors.to(dtype)


def hadamard(num_channels: int) -> Tensor:
    """Return the matrix by its definition, entry by entry."""
    signs = [
        [(-1.0) ** (row & column).bit_count() for column in range(num_channels)]
        for row in range(num_channels)
    ]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(num_channels)


def e4m3_numbers() -> Tensor:
    """Return all of them, by the definition of the format."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [
        (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(1, 16)
        for mantissa in range(8)
    ]
    positive = torch.tensor((subnormal + normal)[:-1], dtype=torch.float64)  # the last is NaN
    return torch.cat([-positive.flip(0), positive])


@pytest.mark.parametrize("num_channels", [2, 16, 64])
def test_values_are_the_nearest_e4m3_of_the_rotated_vector(num_channels: int) -> None:
    vectors = make_vectors(num_channels, torch.float64)
    values, scales = quantize(vectors, impl="eager")
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32, "types"
    rotated = vectors @ hadamard(num_channels)
    peak = rotated.abs().amax(dim=-1).clamp(min=1e-4)
    for scale, largest in zip(scales.tolist(), peak.tolist(), strict=True):
        assert math.frexp(scale)[0] == 0.5, "a power of two"
        assert largest <= LARGEST * scale, "holds the largest entry"
        assert largest > LARGEST * scale / 2, "the smallest that does"
    wanted = rotated / scales.double()[:, None]
    distance = (wanted[..., None] - e4m3_numbers()).abs().amin(dim=-1)
    assert_close((wanted - values.double()).abs(), distance, 1e-12)


def test_ties_go_to_even() -> None:
    # Of channels 16 and 1 the rotation makes numbers that stand midway between two e4m3 ones.
    vectors = torch.tensor([[LARGEST, 17.0], [LARGEST, 19.0]], dtype=torch.float64)
    vectors = vectors @ hadamard(2)
    values, scales = quantize(vectors, impl="eager")
    assert scales.tolist() == [1.0, 1.0], "448 needs no scale"
    assert values.double().tolist() == [[448.0, 16.0], [448.0, 20.0]], "even mantissas"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [2, 16, 64, 128])
def test_triton_gives_the_bits_of_eager(
    num_channels: int, dtype: torch.dtype, fill_new_with_nan: None
) -> None:
    vectors = make_vectors(num_channels, dtype)
    eager_values, eager_scales = quantize(vectors, impl="eager")
    on_device = vectors.to(device("triton"))
    values, scales = quantize(on_device, impl="triton")
    assert torch.equal(scales.cpu(), eager_scales), "scales"
    assert torch.equal(values.cpu().view(torch.uint8), eager_values.view(torch.uint8)), "values"
    rounded = round_to_fp8(on_device, impl="triton")
    assert torch.equal(rounded.cpu(), round_to_fp8(vectors, impl="eager")), "rounded"


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_computes_with_what_inference_keeps(dtype: torch.dtype, impl: str) -> None:
    vectors = make_vectors(64, dtype).to(device(impl))
    values, scales = quantize(vectors, impl=impl)
    rounded = round_to_fp8(vectors, impl=impl)
    assert rounded.dtype == dtype, rounded.dtype
    assert torch.equal(rounded, dequantize(values, scales, dtype)), "the same numbers"
    exact = values.double() * scales.double()[:, None]
    assert torch.equal(rounded.double(), exact), "no bit lost in the wider type"


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("eager", torch.float64),
        ("eager", torch.float32),
        ("eager", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
    ],
)
def test_rounded_vectors_are_split_exactly(
    impl: str, dtype: torch.dtype, fill_new_with_nan: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-9, 6, 400)[:, None]
    vectors = torch.randn(400, 16, generator=generator) * sizes
    vectors[3] = 0
    # Close below and above where the scale doubles, and single channels, which spread evenly.
    vectors[4:8] = torch.eye(16)[:4] * 4 * torch.tensor([447.9, 448.1, 480.0, 511.0])[:, None]
    vectors = vectors.to(dtype)
    rounded = round_to_fp8(vectors, impl="eager")
    values, scales = (each.cpu() for each in split_rounded(rounded.to(device(impl)), impl=impl))
    assert torch.equal(values.double() * scales[:, None].double(), rounded.double()), "numbers"
    _, expected = quantize(vectors, impl="eager")
    # A vector whose largest number was rounded down over the border may have half the scale.
    assert bool(((scales == expected) | (scales == expected / 2)).all()), "scales"


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 1e-2),
    ],
)
def test_the_gradient_passes_the_rounding_and_is_rotated(
    impl: str, dtype: torch.dtype, tolerance: float, fill_new_with_nan: None
) -> None:
    vectors = make_vectors(16, dtype).to(device(impl)).requires_grad_()
    weights = make_tensor(NUM_VECTORS, 16, seed=2, dtype=dtype)
    rounded = round_to_fp8(vectors, impl=impl)
    (gradient,) = torch.autograd.grad(rounded, vectors, weights.to(device(impl)))
    assert_close(gradient, weights.double() @ hadamard(16), tolerance)


def test_products_of_rotated_vectors_are_those_of_the_vectors() -> None:
    q, k = (make_tensor(NUM_VECTORS, 64, seed=seed) for seed in (1, 2))
    rounded = (round_to_fp8(q) * round_to_fp8(k)).sum(dim=-1)
    # Each factor is off by 2^-4 of itself at most, and 64 errors of both signs hardly add up.
    error = (rounded - (q * k).sum(dim=-1)).abs() / (q.norm(dim=-1) * k.norm(dim=-1))
    assert error.max() < 0.02, float(error.max())


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strides_and_further_dimensions_do_not_matter(impl: str) -> None:
    vectors = make_tensor(5, 3, 16, seed=1, dtype=torch.bfloat16).to(device(impl))
    values, scales = quantize(vectors, impl=impl)
    assert values.shape == (5, 3, 16) and scales.shape == (5, 3), "shapes"
    strided = vectors.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous(), "the case is about strides"
    again, same_scales = quantize(strided, impl=impl)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)), "values"
    assert torch.equal(same_scales, scales), "scales"
    none, no_scales = quantize(vectors[:0], impl=impl)
    assert none.shape == (0, 3, 16) and no_scales.shape == (0, 3), "no vectors"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_recomputation_repeats_the_bits(impl: str) -> None:
    vectors = make_vectors(16, torch.float32).to(device(impl)).requires_grad_()
    seen: list[Tensor] = []

    def run(vectors: Tensor) -> Tensor:
        seen.append(round_to_fp8(vectors, impl=impl))
        return seen[-1].square().sum()

    (plain,) = torch.autograd.grad(run(vectors), vectors)
    total = checkpoint(run, vectors, use_reentrant=False)
    (gradient,) = torch.autograd.grad(total, vectors)
    assert len(seen) == 3, "forward, forward, and again in the backward"
    assert torch.equal(seen[1], seen[2]), "recomputed"
    assert torch.equal(gradient, plain), "gradient"


@pytest.mark.slow
def test_compiled_rounding_gives_the_same_bits() -> None:
    vectors = make_vectors(16, torch.float32).requires_grad_()
    torch.compiler.reset()
    rounded = torch.compile(round_to_fp8, backend="eager")(vectors, impl="eager")
    assert torch.equal(rounded, round_to_fp8(vectors, impl="eager")), "forward"
    weights = make_tensor(NUM_VECTORS, 16, seed=2, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(rounded, vectors, weights)
    (plain,) = torch.autograd.grad(round_to_fp8(vectors, impl="eager"), vectors, weights)
    assert torch.equal(gradient, plain), "gradient"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_bits_of_the_cpu_at_the_models_size() -> None:
    vectors = make_tensor(20_001, 17, 64, seed=1, dtype=torch.bfloat16)
    values, scales = quantize(vectors, impl="eager")
    for impl in ("eager", "triton"):
        got, got_scales = quantize(vectors.cuda(), impl=impl)
        assert torch.equal(got_scales.cpu(), scales), f"{impl}: scales"
        assert torch.equal(got.cpu().view(torch.uint8), values.view(torch.uint8)), impl


def test_a_misfit_is_named() -> None:
    with pytest.raises(ValueError, match="vectors: got shape .3, 12., expected a power of two"):
        quantize(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="vectors: got torch.float16"):
        round_to_fp8(torch.zeros(3, 16, dtype=torch.float16))
    values, scales = quantize(torch.zeros(3, 16))
    with pytest.raises(ValueError, match="scales: got shape .2,., expected .3,."):
        dequantize(values, scales[1:], torch.bfloat16)
    with pytest.raises(ValueError, match="dtype: got torch.float16"):
        dequantize(values, scales, torch.float16)
