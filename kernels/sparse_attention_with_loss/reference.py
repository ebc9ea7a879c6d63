# SPDX-License-Identifier: Apache-2.0
"""The plain form of the attention with its indexer's loss: one operator after the other.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.ranges import named
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss


def sparse_attention_with_loss(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scores_TK: Tensor,
    weight_T: Tensor,
    report: Callable[[Tensor], None],
    *,
    scale: float,
    deterministic: bool,
    kept: KeptOutputs | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and loss, both operators in `impl`; see api.sparse_attention_with_loss."""
    out_THC, target_TGK = sparse_attention(
        q_THC,
        k_SGC,
        v_SGC,
        indices_TK,
        scale=scale,
        deterministic=deterministic,
        kept=kept,
        impl=impl,
    )
    loss_impl = "eager" if impl == "eager" else "triton"
    with named("sparse_indexer_loss"):
        kl_TG = sparse_indexer_loss(scores_TK, target_TGK, impl=loss_impl)
        report(kl_TG.detach())
        loss = (kl_TG * weight_T[:, None].to(kl_TG.dtype)).sum()
        return out_THC, loss - loss.detach()
