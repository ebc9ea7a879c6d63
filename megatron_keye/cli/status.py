# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of all commands, and how a command reports errors that its user can fix."""

import functools
import sys
from collections.abc import Callable, Sequence

from megatron_keye.errors import UserError

FAILED = 1
USER_ERROR = 2
LOST_PEERS = 3
HUNG = 4
"""No rank made progress, and the watchdog ended the run."""
STOPPED = 75
"""A signal ended the run after a step, which was saved (EX_TEMPFAIL of sysexits.h: try again)."""
INTERRUPTED = 130

Main = Callable[[Sequence[str]], int]
"""A command's main function: arguments to exit status."""


def report_error(error: Exception) -> int:
    """Write an error's message to standard error and return the exit status."""
    sys.stderr.write(f"error: {error}\n")
    return USER_ERROR


def reports_user_errors(main: Main) -> Main:
    """Make a command report a UserError, or end by Ctrl-C, without a traceback.

    Other errors keep theirs.
    """

    @functools.wraps(main)
    def reporting(arguments: Sequence[str]) -> int:
        try:
            return main(arguments)
        except UserError as error:
            return report_error(error)
        except KeyboardInterrupt:
            return INTERRUPTED

    return reporting
