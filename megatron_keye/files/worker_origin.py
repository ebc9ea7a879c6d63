"""The process that workers are copies of: it imports once, for all of them, what they need.

Apart from the workers because it imports nothing heavy itself: a tool that starts the origin first
of all has torch imported there while it imports torch here.
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def context(preload: Sequence[str]) -> ForkServerContext:
    """Return what makes workers.

    Args:
        preload: Modules that the origin imports; it starts once, with those of the first call.
    """
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(preload))
    return made


def start_early(preload: Sequence[str]) -> None:
    """Start the origin without waiting for it; without this the first worker starts it."""
    context(preload)
    forkserver.ensure_running()
