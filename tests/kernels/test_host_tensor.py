# SPDX-License-Identifier: Apache-2.0
"""A tensor comes back from host memory as it was, in value and strides."""

import pytest
import torch

from megatron_keye.kernels.host_tensor import HostTensor


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_a_tensor_comes_back_as_it_was(device: str) -> None:
    base = torch.randn(8, 70_000, device=device)
    for tensor in (base, base.T, base[:, :3]):
        expected = tensor.clone()
        held = HostTensor(tensor)
        # Memory that the copy must not share once the first one is let go.
        noise = torch.randn_like(base)
        back = held.on_device()
        assert torch.equal(back, expected) and back.device == tensor.device
        assert back.stride() == tensor.stride() and noise.numel()
    if device == "cuda":
        assert not HostTensor(base)._tensor.is_cuda and HostTensor(base)._tensor.is_pinned()
