# SPDX-License-Identifier: Apache-2.0
"""The operators under torch.compile and under activation recomputation.

An operator is one node of the graph, which has no break, and runs as it is, so results are the
same bits. tests/kernels/test_opcheck.py looks at each operator alone.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from tests.support.numerics import document_ranges, make_tensor, moved, trainable

SCALE = 0.3
LENGTH = 12

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(impl: str) -> Inputs:
    """Return q_TIJ, k_SJ, gate_TI, query_THC, key_SGC and value_SGC of a layer."""
    shapes = [(2, 12), (12,), (2,), (2, 10), (1, 10), (1, 10)]
    q, k, gate, query, key, value = (
        make_tensor(LENGTH, *shape, seed=seed, dtype=torch.float32)
        for seed, shape in enumerate(shapes)
    )
    return trainable(moved((q, k, gate, query, key, value), impl))


def run_layer(
    inputs: Inputs, impl: str, show: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Return a number that depends on every operator, and the selection, also shown to `show`."""
    q_TIJ, k_SJ, gate_TI, query_THC, key_SGC, value_SGC = inputs
    ranges = moved(document_ranges(4, LENGTH - 4), impl)
    detached = q_TIJ.detach(), k_SJ.detach(), gate_TI.detach()
    indices_TK = lightning_indexer(*detached, *ranges, 5, impl=impl)
    if show is not None:
        show(indices_TK)
    weight_T = torch.ones(LENGTH, device=q_TIJ.device)
    scores_TK = selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK, impl=impl)
    out_THC, sparse = sparse_attention_with_loss(
        query_THC,
        key_SGC,
        value_SGC,
        indices_TK,
        scores_TK,
        weight_T,
        lambda kl_TG: None,
        scale=SCALE,
        impl=impl,
        deterministic=True,
    )
    dense, _ = dense_indexer_loss(
        q_TIJ, k_SJ, gate_TI, query_THC, key_SGC, *ranges, weight_T, scale=SCALE, impl=impl
    )
    return out_THC.square().sum() + sparse + dense, indices_TK


@pytest.mark.slow
def test_compiled_layers_give_the_same_bits() -> None:
    inputs = make_inputs("eager")
    torch.compiler.reset()
    compiled: Callable[[Inputs, str], tuple[Tensor, Tensor]] = torch.compile(
        run_layer, backend="aot_eager", fullgraph=True
    )
    plain, indices_TK = run_layer(inputs, "eager")
    total, compiled_TK = compiled(inputs, "eager")
    assert torch.equal(total, plain) and torch.equal(compiled_TK, indices_TK), "forward"
    for actual, expected in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        assert torch.equal(actual, expected), "gradient"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_layers_run_the_triton_kernels() -> None:
    inputs = make_inputs("triton")
    torch.compiler.reset()
    plain, indices_TK = run_layer(inputs, "triton")
    total, compiled_TK = torch.compile(run_layer, fullgraph=True)(inputs, "triton")
    assert torch.equal(compiled_TK, indices_TK), "selection"
    torch.testing.assert_close(total, plain)
    wanted = torch.autograd.grad(plain, inputs)
    for actual, expected in zip(torch.autograd.grad(total, inputs), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_recomputation_repeats_the_selection_and_the_gradients(impl: str) -> None:
    inputs = make_inputs(impl)
    selections: list[Tensor] = []

    def layer(*tensors: Tensor) -> Tensor:
        q, k, gate, query, key, value = tensors
        return run_layer((q, k, gate, query, key, value), impl, selections.append)[0]

    total = checkpoint(layer, *inputs, use_reentrant=False)
    got = torch.autograd.grad(total, inputs)
    assert len(selections) == 2, "the layer runs twice"
    assert torch.equal(selections[0], selections[1]), "the same selection, bit by bit"
    wanted = torch.autograd.grad(layer(*inputs), inputs)
    for index, (actual, expected) in enumerate(zip(got, wanted, strict=True)):
        # On a GPU the selected scores add up the keys' gradient in no fixed order.
        if impl == "triton" and actual.is_cuda and index == 1:
            torch.testing.assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected), "gradient"
