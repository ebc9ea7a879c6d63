# SPDX-License-Identifier: Apache-2.0
"""Operators as torch.compile sees them: nodes of its graph, into whose Python it does not look.

A composite operator is one node for the tracer, and what it is made of for autograd and for the
compiler's backend. An opaque one is a leaf: Triton, CUDA, or Python that depends on values; it
runs as it is, and its fake form says what it returns. Outside of a trace either is a plain call.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "megatron_keye_kernels"
"""Of torch.ops; `megatron_keye` belongs to the extension."""
registered: dict[str, torch._ops.OpOverload] = {}
"""What files that are imported registered, by name."""


def composite[**P, R](name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function of tensors and plain values, made of operators that torch knows.

    Args:
        name: Of the operator.

    Returns:
        A decorator; annotations become the operator's schema.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"{NAMESPACE}::{name}", "CompositeImplicitAutograd")(function)
        overload = _keep(name)

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if torch.compiler.is_dynamo_compiling():
                result: R = overload(*arguments, **options)
                return result
            return function(*arguments, **options)

        return call

    return register


def opaque[**P, R](
    name: str, fake: Callable[..., object], *, changes: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as a leaf without gradients: those belong to whatever calls it.

    Args:
        name: Of the operator.
        fake: Returns empty tensors of the result's shapes, types and strides; gets the same
            arguments, and names those that it reads.
        changes: Arguments that it writes to.

    Returns:
        A decorator; annotations become the operator's schema. The first argument is a tensor, and
        all are given by place.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=changes)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        overload = _keep(name)

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if torch.compiler.is_dynamo_compiling() or is_traced(arguments[0]):
                result: R = overload(*arguments, **options)
                return result
            return function(*arguments, **options)

        return call

    return register


def fake_gradients(
    gradient: Tensor, first: Tensor, second: Tensor, third: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a backward pass over three tensors does, empty: a fake form for `opaque`."""
    return (
        first.new_empty(first.shape),
        second.new_empty(second.shape),
        third.new_empty(third.shape),
    )


def _keep(name: str) -> torch._ops.OpOverload:
    registered[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return registered[name]


def is_traced(argument: object) -> bool:
    """Return whether the argument stands for a tensor, as it does where a graph is made."""
    return type(argument) not in (Tensor, torch.nn.Parameter)
