# SPDX-License-Identifier: Apache-2.0
"""Binding of the selected scores' backward pass in CUDA, for Hopper; the forward pass is Triton's.

The contract stands in api.py, the device code in csrc/selected_indexer_scores/. It walks over the
same unions as the Triton form, for all 16 queries of one at once, so that a key's gradient reaches
memory once.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

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
from megatron_keye.kernels.sparse_attention.cuda import at_vectors
from megatron_keye.kernels.union_lists.reference import UnionLists

HEADS, CHANNELS = 16, 64
_MAX_VECTORS = 2**31
"""Places of 16 bytes among keys, counted in 32 bits."""
_NAME = "selected_indexer_scores_backward"


def _fake_backward(
    dscores_TK: Tensor, q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the results, for tracing."""
    dk_SJ = dscores_TK.new_empty(k_SJ.shape)
    return q_TIJ.new_empty(q_TIJ.shape), dk_SJ, dscores_TK.new_empty(gate_TI.shape)


register(_NAME, _fake_backward)


def unsupported_reason(q_TIJ: Tensor, k_SJ: Tensor) -> str | None:
    """Return what the kernel does not take of such a call, as "got ..., expected ...", or None.

    Args:
        q_TIJ: Indexer queries.
        k_SJ: Keys, of the same type and device.
    """
    _, heads, channels = q_TIJ.shape
    got_and_expected = [
        (not q_TIJ.is_cuda, f"a tensor on {q_TIJ.device}", "a GPU"),
        (q_TIJ.dtype != torch.bfloat16, str(q_TIJ.dtype), "torch.bfloat16"),
        (heads != HEADS, f"I = {heads}", f"{HEADS}"),
        (channels != CHANNELS, f"J = {channels}", f"{CHANNELS}"),
        (
            k_SJ.shape[0] * k_SJ.stride(0) // 8 >= _MAX_VECTORS,
            f"S = {k_SJ.shape[0]}",
            "keys within 32 GiB",
        ),
    ]
    return first_unsupported(got_and_expected) or hopper_reason(_NAME, q_TIJ.device)


def suits(q_TIJ: Tensor, k_SJ: Tensor) -> bool:
    """Return whether the kernel is built and takes such a call, which it then makes fastest."""
    return missing_reason(_NAME) is None and unsupported_reason(q_TIJ, k_SJ) is None


def check_call(q_TIJ: Tensor, k_SJ: Tensor) -> None:
    """Raise unless the kernel is there and takes such a call.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: The kernel does not take such tensors.
    """
    check_built(_NAME)
    check_taken("selected_indexer_scores", unsupported_reason(q_TIJ, k_SJ))


def score_selected_backward(
    dscores_TK: Tensor, q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, lists: UnionLists
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_TIJ, dk_SJ and dgate_TI in the types of their inputs; see triton.py.

    The order of additions to dk_SJ varies from call to call.
    """
    (q_TIJ,), (k_SJ,) = (
        at_vectors(each if each.stride(-1) == 1 else each.contiguous()) for each in (q_TIJ, k_SJ)
    )
    dq_TIJ, dk_SJ, dgate_TI = torch.ops.megatron_keye.selected_indexer_scores_backward(
        dscores_TK, q_TIJ, k_SJ, gate_TI.float().contiguous(), *lists, CHANNELS**-0.5
    )
    return dq_TIJ, dk_SJ.to(k_SJ.dtype), dgate_TI.to(gate_TI.dtype)
