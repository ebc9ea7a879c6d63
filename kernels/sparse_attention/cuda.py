# SPDX-License-Identifier: Apache-2.0
"""Binding of the CUDA sparse attention: both passes on Hopper's own instructions.

The contract stands in api.py, the device code in csrc/sparse_attention/. It walks over the same
unions as the Triton form, with the same results but for rounding. What keeps the tensor cores busy
is that one warpgroup gathers keys while the others multiply: in the forward pass each beside its
own softmax and only with keys that its own queries need, in the backward pass while the sums of
the tile before are on their way to memory.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B tiles
of queries, U places of a union.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_keye.kernels.extension import (
    check_built,
    check_taken,
    first_unsupported,
    hopper_reason,
    missing_reason,
    register,
)
from megatron_keye.kernels.union_lists import UnionLists

HEADS = (4, 8, 16)
"""Query heads of a group that fill the rows of a tensor core."""
CHANNELS = (64, 128)
_MEASURED = ((8, 128),)
"""Heads of a group and channels with which both passes were timed beside Triton's."""
_MAX_VECTORS = 2**31
"""Places of 16 bytes among keys or values, counted in 32 bits."""
BACKWARD: Literal["triton", "bulk", "pairs"] = "bulk"
"""Backward pass of impl "cuda": Triton's, or that of the extension, whose sums leave in bulk or in
pairs. Only tests and benchmarks set it. In bulk is fastest: 118 ms at 128K against 132 in pairs
and 141 by Triton, on an H200. Where gradients must be deterministic it is Triton's."""
_NAME = "sparse_attention_forward"
_BACKWARD_NAME = "sparse_attention_backward"


def _fake_sparse_attention_forward(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    keys_BU: Tensor,
    masks_BU: Tensor,
    counts_B: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the results, for tracing."""
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    return out_THC, q_THC.new_empty(q_THC.shape[:2], dtype=torch.float32)


def _fake_sparse_attention_backward(
    dout_THC: Tensor, q_THC: Tensor, k_SGC: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the results, for tracing."""
    num_keys, num_groups, channels = k_SGC.shape
    sums_GS2C = k_SGC.new_empty((num_groups, num_keys, 2, channels), dtype=torch.float32)
    return q_THC.new_empty(q_THC.shape), sums_GS2C


register(_NAME, _fake_sparse_attention_forward)
register(_BACKWARD_NAME, _fake_sparse_attention_backward)


def unsupported_reason(q_THC: Tensor, k_SGC: Tensor, scale: float) -> str | None:
    """Return what the kernel does not take of such a call, as "got ..., expected ...", or None.

    Args:
        q_THC: Queries.
        k_SGC: Keys, of the same type and device.
        scale: Factor of the logits.
    """
    heads, channels = q_THC.shape[1] // max(1, k_SGC.shape[1]), q_THC.shape[2]
    num_vectors = k_SGC.shape[0] * k_SGC.stride(0) // 8
    got_and_expected = [
        (not q_THC.is_cuda, f"a tensor on {q_THC.device}", "a GPU"),
        (q_THC.dtype != torch.bfloat16, str(q_THC.dtype), "torch.bfloat16"),
        (channels not in CHANNELS, f"C = {channels}", "64 or 128"),
        (heads not in HEADS, f"H / G = {heads}", "4, 8 or 16"),
        (scale <= 0, f"scale = {scale}", "more than 0"),
        (num_vectors >= _MAX_VECTORS, f"S = {k_SGC.shape[0]}", "keys within 32 GiB"),
    ]
    return first_unsupported(got_and_expected) or hopper_reason(_NAME, q_THC.device)


def suits(q_THC: Tensor, k_SGC: Tensor, scale: float) -> bool:
    """Return whether the kernels are built, take such a call, and were measured to be fastest."""
    if missing_reason(_NAME) is not None or unsupported_reason(q_THC, k_SGC, scale) is not None:
        return False
    return (q_THC.shape[1] // k_SGC.shape[1], q_THC.shape[2]) in _MEASURED


def check_call(q_THC: Tensor, k_SGC: Tensor, scale: float) -> None:
    """Raise unless the kernel is there and takes such a call.

    Args:
        q_THC: Queries.
        k_SGC: Keys, of the same type and device.
        scale: Factor of the logits.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: The kernel does not take such tensors.
    """
    check_built(_NAME)
    check_taken("sparse_attention", unsupported_reason(q_THC, k_SGC, scale))


def attend(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, lists: UnionLists, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH.

    Args:
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        v_SGC: Values; strides of `k_SGC`.
        lists: Unions of the selections.
        scale: Factor of the logits.

    Returns:
        The output, and float32 log2 of each row's sum of exponentials, +inf without any key.
    """
    k_SGC, v_SGC = at_vectors(k_SGC, v_SGC)
    (q_THC,) = at_vectors(q_THC)
    out_THC, lse_TH = torch.ops.megatron_keye.sparse_attention_forward(
        q_THC, k_SGC, v_SGC, *lists, scale
    )
    return out_THC, lse_TH


def attend_backward(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    lists: UnionLists,
    *,
    scale: float,
    in_bulk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_THC, dk_SGC and dv_SGC in the types of `q_THC` and `k_SGC`.

    Args:
        dout_THC: Gradient of the output, contiguous.
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        v_SGC: Values; strides of `k_SGC`.
        out_THC: From `attend`.
        lse_TH: From `attend`.
        lists: Unions of the selections.
        scale: Factor of the logits.
        in_bulk: Whether sums of keys leave a multiprocessor as rows from shared memory, else as
            pairs from registers. Either way the order of additions varies from call to call.
    """
    check_built(_BACKWARD_NAME)
    k_SGC, v_SGC = at_vectors(k_SGC, v_SGC)
    (dout_THC,), (q_THC,), (out_THC,) = map(at_vectors, (dout_THC, q_THC, out_THC))
    dq_THC, sums_GS2C = torch.ops.megatron_keye.sparse_attention_backward(
        dout_THC, q_THC, k_SGC, v_SGC, out_THC, lse_TH, *lists, scale, in_bulk
    )
    dk_SGC, dv_SGC = (
        sums_GSC.transpose(0, 1).to(k_SGC.dtype).contiguous()
        for sums_GSC in sums_GS2C.unbind(dim=2)
    )
    return dq_THC, dk_SGC, dv_SGC


def at_vectors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of equal strides, copied if any row does not begin at 16 bytes."""
    if all(map(_begins_at_vectors, tensors)):
        return tensors
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)


def _begins_at_vectors(tensor: Tensor) -> bool:
    """Return whether all rows of channels begin at multiples of 16 bytes."""
    is_stride_whole = all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    return is_stride_whole and tensor.data_ptr() % 16 == 0
