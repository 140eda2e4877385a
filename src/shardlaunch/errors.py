"""The error that is shown to users as one message instead of a traceback."""

import re
from collections.abc import Iterable

MOST_NAMED = 10
# Exit statuses: lost contact with another rank (or any other error), a UserError, a run that was asked to stop and is
# to be started again, one that had come to a stop, and one that was ended at once.
EXIT_OTHER_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # as EX_TEMPFAIL of sysexits.h
EXIT_HUNG = 124  # as of timeout(1)
EXIT_INTERRUPTED = 130


# Control characters but tab and line feed, characters that change the direction or the line of a text, and bytes of
# file names that are not text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    `launch` prints the message and exits with status 2; `--debug` also shows the traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str, *, is_name: bool = False) -> str:
    r"""Return a text that a terminal can be given: control characters as escapes such as \x1b.

    A name stands on one line, so that its tabs and line feeds are escapes too.
    """
    text = _UNPRINTABLE.sub(_escaped, text)
    return re.sub("[\t\n]", _escaped, text) if is_name else text


def _escaped(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode("ascii")


def some(names: Iterable[str], most: int = MOST_NAMED) -> str:
    """Join names for a message: at most `most`, and the number of the others."""
    names = [printable(name, is_name=True) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
