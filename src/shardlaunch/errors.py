"""The error that is shown to users as one message instead of a traceback."""

from collections.abc import Iterable

MOST_NAMED = 10
# Exit statuses: lost contact with another rank (or any other error), a UserError, and Ctrl-C.
EXIT_OTHER_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    `launch` prints the message and exits with status 2; `--debug` also shows the traceback.
    """


def some(names: Iterable[str]) -> str:
    """Join names for a message: at most ten, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
