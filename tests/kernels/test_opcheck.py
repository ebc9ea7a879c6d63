# SPDX-License-Identifier: Apache-2.0
"""Every public operator under torch.compile without a break, and torch's checks of its parts.

Each case is compiled with a backend that notes which operators of the package the graphs hold,
forward and backward, and with what; torch.library.opcheck then looks at each of them: schema,
fake form, registration for autograd, and results and gradients through AOTAutograd.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from megatron_keye.kernels import registration
from tests.support.operator_cases import OperatorCase, operator_cases

KERNELS = Path(__file__).parents[2] / "kernels"
NAMES = list(operator_cases("cpu", torch.float32))
TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
HOLD_FLOAT8 = (
    "dequantize",
    "dequantize_heads",
    "dequantize_heads_as",
    "quantize",
    "quantize_as",
    "quantize_heads",
    "quantize_heads_as",
    "rotate_channels",
    "round_to_fp8",
    "sparse_attention_fp8",
    "sparse_attention_fp8_as",
    "split_rounded",
    "split_rounded_as",
)
"""Operators without torch's check of schemas, which multiplies float8 numbers."""
ONLY_EAGER = ("dequantize", "fill_normal")
Calls = dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]


class Noting(fx.Interpreter):
    """Runs a graph and notes the calls of the package's operators."""

    def __init__(self, graph: fx.GraphModule, calls: Calls) -> None:
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in registration.registered.values():
            self.calls[target] = args, kwargs
        return super().call_function(target, args, kwargs)


def noting_backend(calls: Calls, *, notes_composites: bool) -> Callable[..., Any]:
    """Return a backend that runs graphs as they are, before and after autograd is traced."""

    def compile_graph(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *inputs: Noting(graph, calls).run(*inputs)

    aot = aot_autograd(fw_compiler=compile_graph, bw_compiler=compile_graph)

    def compile_whole(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced = aot(graph, inputs)

        def run(*arguments: Any) -> Any:
            if notes_composites:
                with torch.no_grad():
                    Noting(graph, calls).run(*arguments)
            return traced(*arguments)

        return run

    return compile_whole


def run_case(
    case: OperatorCase, call: Callable[..., tuple[Tensor, ...]], impl: str | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return what an operator returns, and the gradients of a weighting of that."""
    leaves = [each.detach().clone() for each in case.inputs]
    for leaf in leaves[: case.num_differentiable]:
        leaf.requires_grad_()
    outputs = call(*leaves, impl=impl)
    if not case.num_differentiable:
        return outputs, ()
    learnt = [each for each in outputs if each.requires_grad]
    total = sum(
        (each.nan_to_num(neginf=0.0).float().sin().sum() for each in learnt),
        torch.zeros(()).to(leaves[0].device),
    )
    return outputs, torch.autograd.grad(total, leaves[: case.num_differentiable])


def compile_and_check(
    case: OperatorCase,
    impl: str | None,
    tolerance: float | None = None,
    *,
    notes_composites: bool = True,
) -> Calls:
    """Compare the compiled call with the plain one; return the operators that it consists of."""
    calls: Calls = {}
    torch.compiler.reset()
    backend = noting_backend(calls, notes_composites=notes_composites)
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    plain, got = run_case(case, case.call, impl), run_case(case, compiled, impl)
    for actual, expected in zip([*got[0], *got[1]], [*plain[0], *plain[1]], strict=True):
        if tolerance is None:
            assert torch.equal(actual.float(), expected.float()), "not the same bits"
        else:
            torch.testing.assert_close(
                actual.float(), expected.float(), rtol=tolerance, atol=tolerance
            )
    return calls


def opcheck(calls: Calls, *, with_dynamic_shapes: bool = True) -> None:
    """Let torch look at each operator."""
    for operator, (args, kwargs) in calls.items():
        tests = TESTS[operator._opname in HOLD_FLOAT8 : None if with_dynamic_shapes else -1]
        # A leaf is called below autograd.
        is_leaf = not operator.has_kernel_for_dispatch_key("CompositeImplicitAutograd")
        given = tuple(
            each.detach() if is_leaf and isinstance(each, Tensor) else each for each in args
        )
        torch.library.opcheck(operator, given, kwargs, test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_eager_compiles_without_a_break_to_the_same_bits(name: str) -> None:
    calls = compile_and_check(operator_cases("cpu", torch.float32)[name], None)
    assert calls, "the graph holds no operator of the package"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eager_passes_opcheck(name: str) -> None:
    opcheck(compile_and_check(operator_cases("cpu", torch.float32)[name], None))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_EAGER])
def test_triton_compiles_without_a_break_and_passes_opcheck(name: str) -> None:
    case = operator_cases("cpu", torch.float32)[name]
    impl = "sdpa" if name.startswith("dense_attention") else "triton"
    opcheck(compile_and_check(case, impl, 1e-6, notes_composites=False), with_dynamic_shapes=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_the_default_on_a_gpu_compiles_without_a_break_and_passes_opcheck(name: str) -> None:
    case = operator_cases("cuda", torch.bfloat16)[name]
    opcheck(compile_and_check(case, None, 2e-2))


def test_every_public_operator_has_a_case() -> None:
    public = {"fill_normal"}
    for path in KERNELS.glob("*/__init__.py"):
        package = importlib.import_module(f"megatron_keye.kernels.{path.parent.name}")
        functions = (name for name in package.__all__ if name.islower())
        public |= {name for name in functions if not name.startswith("fastest")}
    assert public == set(NAMES), "tests/support/operator_cases.py needs a case for each of them"
