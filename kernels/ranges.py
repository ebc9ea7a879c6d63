"""Names of parts of an operator in a profiler's trace."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def named(name: str) -> AbstractContextManager[object]:
    """Name what runs inside in a profiler's trace; nothing, also to a compiler, without one."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
