# SPDX-License-Identifier: Apache-2.0
"""Public function of the sparse attention: contract, checks and choice of implementation.

Attention to 2,048 selected keys passes torch's dense attention between 8K and 32K tokens: on an
H100 (bf16, 32/4 heads x 128) 0.8 times its speed at 8K, 1.8 times at 32K, 6 times at 128K.

It also returns the indexer's target, which is the attention's own softmax over the selected keys.
Where the attention has a backward pass `sparse_attention_with_loss` gathers the target there.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    INDEX_DTYPES,
    check_dtypes,
    check_groups,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.registration import composite
from megatron_keye.kernels.sparse_attention import cuda, reference

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists. The default is "cuda" for groups of 8 heads of 128 channels where it is built and
takes the call, else "triton" on a GPU in the types that it takes, else "eager"."""


def sparse_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    deterministic: bool = False,
    with_target: bool = True,
    kept: KeptOutputs | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with every head of a query to the keys selected for that query.

    Query head h uses key-value head h // (H / G). The output is differentiable in `q_THC`,
    `k_SGC` and `v_SGC`; the target is not. A query without any key gives 0 and gradients of 0.

    Args:
        q_THC: Queries, any float type; H a multiple of G.
        k_SGC: Keys, type of `q_THC`.
        v_SGC: Values, type of `q_THC`.
        indices_TK: int32 or int64, selected keys in any order, each counted as often as it
            stands there; -1, like every entry outside 0 <= index < S, is padding and loads
            neither key nor value. Causality and documents are up to the selection.
            "triton" and "cuda" take rows only as `select_top_k` gives them: ascending, distinct,
            padded last.
        scale: Factor of the logits, usually C^-0.5.
        deterministic: Whether the gradients of keys and values are the same bits at every call.
            "triton" and "cuda" then sum them as 64-bit integers, with twice the memory traffic;
            "eager" is deterministic on a CPU anyway and refuses on a GPU.
        with_target: Whether the target is computed; without it K is 0 in its shape.
        kept: Keeps what the backward pass needs for a second call with the same tensors, which
            then takes it from there; "eager" computes it again. None: nothing is kept, and
            torch.compile takes the operator as one.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" takes float32, bfloat16
            and float16, groups of up to 128 heads and heads of up to 256 channels. "cuda" takes
            bfloat16, groups of 4, 8 or 16 heads, heads of 64 or 128 channels and a scale above 0,
            on a GPU of compute capability 9.0; with `deterministic` its backward pass is that of
            "triton".

    Returns:
        out_THC, type of `q_THC`, and target_TGK, float32 (float64 for float64 inputs): the mean
        over the H / G heads of a group of each head's softmax over the selected keys. It sums
        to 1 over K and is 0 where the entry is padding.

    Raises:
        ValueError: On shapes, types or devices that do not fit, or an unknown `impl`.
        RuntimeError: "cuda" is asked for and its extension is not built; "triton" got tensors on
            a CPU; or either got rows that are not ascending and distinct (on a GPU as a
            device-side assertion).

    Source: arXiv 2606.10651, sparse attention and the indexer's target on the selected set.
    """
    operands, options = (q_THC, k_SGC, v_SGC, indices_TK), (scale, deterministic, with_target)
    if kept is None:
        return _attend_once(*operands, *options, impl)
    return _attend(*operands, *options, impl, kept)


@composite("sparse_attention")
def _attend_once(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scale: float,
    deterministic: bool,
    with_target: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Return what sparse_attention returns where nothing is kept."""
    operands, options = (q_THC, k_SGC, v_SGC, indices_TK), (scale, deterministic, with_target)
    return _attend(*operands, *options, impl, KeptOutputs())


def _attend(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    indices_TK: Tensor,
    scale: float,
    deterministic: bool,
    with_target: bool,
    impl: str | None,
    kept: KeptOutputs,
) -> tuple[Tensor, Tensor]:
    sizes = check_shapes(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC, indices_TK=indices_TK)
    check_groups(sizes["H"], sizes["G"])
    check_same_dtype(q_THC=q_THC, k_SGC=k_SGC, v_SGC=v_SGC)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    takes_triton = suits_triton(q_THC, k_SGC, v_SGC)
    takes_cuda = takes_triton and cuda.suits(q_THC, k_SGC, scale)
    chosen = choose_impl(
        "sparse_attention", impl, IMPLEMENTATIONS, triton=takes_triton, cuda=takes_cuda
    )
    if chosen != "eager":
        # Loaded on demand: everything else must import where Triton cannot compile.
        autograd = import_module("megatron_keye.kernels.sparse_attention.autograd")
        result: tuple[Tensor, Tensor] = autograd.sparse_attention(
            q_THC,
            k_SGC,
            v_SGC,
            indices_TK,
            scale=scale,
            deterministic=deterministic,
            with_target=with_target,
            kept=kept,
            impl=chosen,
        )
        return result
    if deterministic and q_THC.is_cuda:
        raise ValueError(
            "deterministic: got True with impl 'eager' on a GPU, where torch adds gradients in no "
            "fixed order; take impl='triton'"
        )
    out_THC, target_TGK = reference.sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=scale)
    return out_THC, target_TGK if with_target else target_TGK[:, :, :0]
