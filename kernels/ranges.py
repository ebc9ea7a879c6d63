# SPDX-License-Identifier: Apache-2.0
"""Names of parts of an operator in a profiler's trace."""

from contextlib import AbstractContextManager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function


def named(name: str) -> AbstractContextManager[object]:
    """Name what runs inside in a profiler's trace; nothing, also to a compiler, without one."""
    return record_function(name) if _profiler_enabled() else nullcontext()
