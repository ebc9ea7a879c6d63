# SPDX-License-Identifier: Apache-2.0
"""The fork server, which worker processes are forked from: it imports once what all of them need.

A module of its own, without heavy imports: a tool that starts the fork server first has torch
imported there while it imports torch itself.
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from megatron_keye.files.temporary import keep_sockets_removable


def context(preload: Sequence[str]) -> ForkServerContext:
    """Return the multiprocessing context of worker processes.

    Args:
        preload: Modules for the fork server to import; it starts once, with the first call's.
    """
    keep_sockets_removable()
    fork_context = multiprocessing.get_context("forkserver")
    fork_context.set_forkserver_preload(list(preload))
    return fork_context


def start_early(preload: Sequence[str]) -> None:
    """Start the fork server without waiting for it; otherwise the first worker starts it."""
    context(preload)
    forkserver.ensure_running()
