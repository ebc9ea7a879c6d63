# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels through their interpreter where there is no GPU."""

import os
from typing import Any

import pytest
import torch

from tests.support.benchmark import Recorder

if not torch.cuda.is_available():
    # Read when the kernels are first imported, which happens inside the tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton import language
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        """Let loop bounds be numbers: Triton 3.6 holds them as arrays [1], NumPy 2.5 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _call_interpreted(self: JITFunction, *values: Any, **named: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)(*values, **named)

    _dot = interpreter.InterpreterBuilder.create_dot

    def _dot_of_bfloat16(self: Any, a: Any, b: Any, *others: Any) -> Any:
        """Widen bfloat16, which the interpreter holds as its bits and would multiply as such."""
        if a.dtype.scalar == language.bfloat16:
            a, b = (self.cast_impl(x, language.float32) for x in (a, b))
        return _dot(self, a, b, *others)

    _convert = interpreter._convert_float
    _types = {
        language.float32: torch.float32,
        language.bfloat16: torch.bfloat16,
        language.float8e4nv: torch.float8_e4m3fn,
    }

    def _convert_rounding(array: Any, source: Any, target: Any, mode: Any) -> Any:
        """Round to nearest even as a GPU does; the interpreter cuts digits off."""
        if source not in _types or target not in _types:
            return _convert(array, source, target, mode)
        words = torch.frombuffer(bytearray(array.tobytes()), dtype=_types[source])
        integers = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[_types[target].itemsize]
        return words.to(_types[target]).view(integers).numpy().reshape(array.shape)

    interpreter._convert_float = _convert_rounding
    interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
    interpreter._patch_lang_tensor = _patch_tensor_for_numpy
    # Megatron imported Triton's own functions (tl.max and others) before the setting above.
    JITFunction.__call__ = _call_interpreted


@pytest.fixture
def fill_new_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what kernels allocate with NaN, so that an entry left unwritten shows."""
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Return what benchmark cases report to."""
    if not torch.cuda.is_available():
        pytest.exit("--benchmark: no CUDA device; there is nothing to time on a CPU", returncode=2)
    return Recorder(request.config.getoption("--benchmark-out"))
