"""Exit statuses of all commands, and how an error of the user is told."""

import functools
import sys
from collections.abc import Callable, Sequence

from megatron_keye.errors import UserError

FAILED = 1
USER_ERROR = 2
LOST_PEERS = 3
STOPPED = 75
"""A signal ended the run after a step, which was saved (EX_TEMPFAIL of sysexits.h: try again)."""
INTERRUPTED = 130

Main = Callable[[Sequence[str]], int]
"""Takes the arguments of a command and returns its exit status."""


def tell(error: Exception) -> int:
    """Write an error as one sentence and return the exit status."""
    sys.stderr.write(f"error: {error}\n")
    return USER_ERROR


def tells_user_errors(main: Main) -> Main:
    """Make a command tell a UserError in one sentence, and end by Ctrl-C without a traceback.

    Other errors keep theirs.
    """

    @functools.wraps(main)
    def telling(arguments: Sequence[str]) -> int:
        try:
            return main(arguments)
        except UserError as error:
            return tell(error)
        except KeyboardInterrupt:
            return INTERRUPTED

    return telling
