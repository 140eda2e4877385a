"""The one error that a user sees as a single message instead of a traceback."""

from collections.abc import Iterable

MOST_NAMED = 10
# Exit statuses: of a run whose other ranks are gone, of a UserError, and after Ctrl-C.
EXIT_OTHER_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Report what a user can mend: what is wrong, where, and what to do.

    `launch` prints its text and ends the run with exit status 2; `--debug` shows the traceback too.
    """


def some(names: Iterable[str]) -> str:
    """Join names for a message: at most ten of them, with the count of the others."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
