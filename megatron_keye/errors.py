# SPDX-License-Identifier: Apache-2.0
"""The error that commands report in one sentence; all others keep their traceback."""


class UserError(ValueError):
    """Wrong settings, data or files; states what was got, what was expected and what to change.

    A ValueError for callers of the library. This package catches only UserError, since a plain
    ValueError is a programming error.
    """
