"""The process that workers are copies of: it imports once, for all of them, what they need.

Apart from the workers because it imports nothing heavy itself: a tool that starts the origin first
of all has torch imported there while it imports torch here.
"""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_PRELOADED = ["megatron_keye.checkpoint.to_hf", "megatron_keye.checkpoint.to_native"]


def context() -> ForkServerContext:
    """Return what makes workers."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_PRELOADED)
    return made


def start_early() -> None:
    """Start the origin without waiting for it; without this the first worker starts it."""
    context()
    forkserver.ensure_running()
