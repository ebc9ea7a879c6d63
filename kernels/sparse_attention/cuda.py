"""Binding of the CUDA sparse attention: the forward pass on Hopper's own instructions.

The contract stands in api.py, the device code in csrc/sparse_attention/. It walks over the same
unions as the Triton form, with the same results but for rounding. What keeps the tensor cores busy
is that one warpgroup gathers keys while the others multiply, each beside its own softmax and only
with keys that its own queries need.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B tiles
of queries, U places of a union.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.extension import check_built, hopper_reason, register
from megatron_keye.kernels.union_lists import UnionLists

HEADS = (4, 8, 16)
"""Query heads of a group that fill the rows of a tensor core."""
CHANNELS = (64, 128)
_MAX_VECTORS = 2**31
"""Places of 16 bytes among keys or values, counted in 32 bits."""
_NAME = "sparse_attention_forward"


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


register(_NAME, _fake_sparse_attention_forward)


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
    for is_unsupported, got, expected in got_and_expected:
        if is_unsupported:
            return f"got {got}, expected {expected}"
    return hopper_reason(_NAME, q_THC.device)


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
    # Refused here, since exceptions thrown by the extension can't be relied on.
    found = unsupported_reason(q_THC, k_SGC, scale)
    if found is not None:
        raise ValueError(f"sparse_attention: {found} with impl 'cuda'; take impl='triton'")


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
    if not _begins_at_vectors(k_SGC) or not _begins_at_vectors(v_SGC):
        k_SGC, v_SGC = (_copied(tensor) for tensor in (k_SGC, v_SGC))
    if not _begins_at_vectors(q_THC):
        q_THC = _copied(q_THC)
    out_THC, lse_TH = torch.ops.megatron_keye.sparse_attention_forward(
        q_THC, k_SGC, v_SGC, *lists, scale
    )
    return out_THC, lse_TH


def _begins_at_vectors(tensor: Tensor) -> bool:
    """Return whether all rows of channels begin at multiples of 16 bytes."""
    is_stride_whole = all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    return is_stride_whole and tensor.data_ptr() % 16 == 0


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
