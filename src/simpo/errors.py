"""The one exception that a user's mistake ends in."""


class SimpoError(ValueError):
    """A mistake in what the user gave: data, recipe, model or folder.

    The message is one line that says what was wrong, where (``file:line`` or the key) and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
