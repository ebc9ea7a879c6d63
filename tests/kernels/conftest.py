"""Runs the Triton kernels through their interpreter where there is no GPU."""

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported, which happens inside the tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        """Let loop bounds be numbers: Triton 3.6 holds them as arrays [1], NumPy 2.5 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _call_interpreted(self: JITFunction, *values: Any, **named: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)(*values, **named)

    interpreter._patch_lang_tensor = _patch_tensor_for_numpy
    # Megatron imported Triton's own functions (tl.max and others) before the setting above.
    JITFunction.__call__ = _call_interpreted
