"""The error that is told to a user in one sentence; every other error keeps its traceback."""


class UserError(ValueError):
    """Wrong settings, data or files: says what was got, what was expected and what to change.

    A ValueError, so that callers of the library may catch it as one. Code of this package catches
    UserError itself: a plain ValueError is a mistake in a program.
    """
