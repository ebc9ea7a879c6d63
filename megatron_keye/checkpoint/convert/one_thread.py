# SPDX-License-Identifier: Apache-2.0
"""Runs torch on one thread, for conversions that already use all cores by processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread inside the context, or inside a function decorated with it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
