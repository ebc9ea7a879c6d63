# SPDX-License-Identifier: Apache-2.0
"""Binding of the CUDA lightning indexer: scores and selection in one, for Hopper.

The contract stands in api.py, the device code in csrc/lightning_indexer/. A sample of each row's
scores gives a threshold, only scores that reach it are kept, and the exact selection is made among
them: the matrix of scores is never written. Rows that the sample misjudged are selected again.

Rounded queries and keys are multiplied as e4m3 numbers. Hopper adds up 32 of their exact products,
and what is summed already, after it cut off of each what lies below 2^-13 of the largest power of
two among them; of the sum, 13 bits behind its first are kept. So q . k errs by less than 2 * 34 *
2^-13 of the largest magnitude among its 64 products and the sums of 32 and of all of them.
Source: P. Xie et al., "MMA-Sim", arXiv 2511.10909, for what Hopper adds up.

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
from megatron_keye.kernels.indexer_quantization import split_rounded

CHANNELS = 64
MAX_HEADS = 16
MAX_KEYS = 262144
MAX_SELECTED = 2048
PAYS_ABOVE_KEYS = 16384
"""Rows up to here are selected from as fast by scoring and selecting apart (one H100)."""
_NAME = "lightning_indexer"

SCRATCH_BYTES = 2**30
"""Candidates, or scores of rows selected again, that exist at once; tests shrink it."""


def _fake_lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    key_scale_S: Tensor | None,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    scratch_bytes: int,
) -> Tensor:
    """Shape and dtype of the result, for tracing."""
    return q_TIJ.new_empty((q_TIJ.shape[0], k), dtype=torch.int32)


register(_NAME, _fake_lightning_indexer)


def unsupported_reason(q_TIJ: Tensor, k_SJ: Tensor, k: int) -> str | None:
    """Return what the kernels do not take of such a call, as "got ..., expected ...", or None.

    Args:
        q_TIJ: Indexer queries.
        k_SJ: Keys, of the same type and device.
        k: Keys to select.
    """
    _, num_heads, num_channels = q_TIJ.shape
    got_and_expected = [
        (not q_TIJ.is_cuda, f"a tensor on {q_TIJ.device}", "a GPU"),
        (q_TIJ.dtype != torch.bfloat16, str(q_TIJ.dtype), "torch.bfloat16"),
        (num_channels != CHANNELS, f"J = {num_channels}", f"{CHANNELS}"),
        (not 1 <= num_heads <= MAX_HEADS, f"I = {num_heads}", f"1 to {MAX_HEADS}"),
        (k_SJ.shape[0] > MAX_KEYS, f"S = {k_SJ.shape[0]}", f"at most {MAX_KEYS}"),
        (k > MAX_SELECTED, f"k = {k}", f"at most {MAX_SELECTED}"),
    ]
    return first_unsupported(got_and_expected) or hopper_reason(_NAME, q_TIJ.device)


def suits(q_TIJ: Tensor, k_SJ: Tensor, k: int) -> bool:
    """Return whether the extension is there, takes such a call, and is the fastest for it.

    Args:
        q_TIJ: Indexer queries.
        k_SJ: Keys, of the same type and device.
        k: Keys to select.
    """
    if not q_TIJ.is_cuda or missing_reason(_NAME) is not None:
        return False
    return k_SJ.shape[0] > PAYS_ABOVE_KEYS and unsupported_reason(q_TIJ, k_SJ, k) is None


@torch.no_grad()
def lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    *,
    is_rounded: bool = False,
) -> Tensor:
    """Return indices_TK; see api.lightning_indexer. NaN scores rank below -inf.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: The kernels do not take such tensors.
    """
    check_built(_NAME)
    check_taken("lightning_indexer", unsupported_reason(q_TIJ, k_SJ, k))
    key_scale_S = None
    gate_TI = gate_TI.float()
    if is_rounded:
        q_TIJ, query_scale_TI = split_rounded(q_TIJ)
        k_SJ, key_scale_S = split_rounded(k_SJ)
        gate_TI = gate_TI * query_scale_TI  # exact, as relu's argument may be divided by it
    indices_TK: Tensor = torch.ops.megatron_keye.lightning_indexer(
        q_TIJ.contiguous(),
        k_SJ.contiguous(),
        key_scale_S,
        gate_TI.contiguous(),
        key_start_T.contiguous(),
        key_end_T.contiguous(),
        k,
        SCRATCH_BYTES,
    )
    return indices_TK
