"""Times as people write them on a command line."""

import re

from shardlaunch.errors import UserError

_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_IN_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)
_IN_COLONS = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", re.ASCII)


def seconds_of(text: str, flag: str) -> int:
    """Return the seconds in a time such as 90m, 1h30m, 2d or, as Slurm writes it, 36:00:00 or 1-12:00:00.

    Raises UserError, which names the option, for anything else, also for a number without a unit.
    """
    found = _IN_UNITS.fullmatch(text) or _IN_COLONS.fullmatch(text)
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), _UNITS_S.values(), strict=True)) if found else 0
    if not seconds:
        raise UserError(f"{flag} {text}: write a time with its units, such as 90m, 1h30m, 2d or 36:00:00")
    return seconds


def duration_text(seconds: float) -> str:
    """Return a time as a person would say it: 40 s, 12 min, 3.5 h."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
