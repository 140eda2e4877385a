"""The one error that a user sees as a single message instead of a traceback."""


class UserError(ValueError):
    """Report what a user can mend: what is wrong, where, and what to do.

    `launch` prints its text and ends the run with exit status 2; `--debug` shows the traceback too.
    """
