"""Pieces of HTML that several sections have, and numbers as text."""

from collections.abc import Sequence
from html import escape

from shardlaunch.launcher.commands.report.charts import short
from shardlaunch.launcher.commands.report.look import NUM_COLORS


def key(number: int) -> str:
    """Return the letter of a run on its colour."""
    return f'<span class="key k{number % NUM_COLORS}">{letter(number)}</span>'


def named(number: int, name: str) -> str:
    """Return the letter of a run and its name, which a narrow screen leaves out in tables."""
    return f'{key(number)}<span class="name">{escape(name)}</span>'


def letter(number: int) -> str:
    """Return the letter of a run: A to Z, then A2 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), long: Sequence[int] = ()
) -> str:
    """Return a table of cells that are HTML already.

    The columns in `numbers` end at the right, those in `long` have texts of several lines.
    """
    kinds = dict.fromkeys(numbers, " class=n") | dict.fromkeys(long, " class=long")

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{kinds.get(column, '')}>{cell}</{tag}>" for column, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(heads, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def grid(parts: Sequence[str]) -> str:
    """Return parts side by side, as many as there is room for; nothing for no parts."""
    return f'<div class="grid-of">{"".join(parts)}</div>' if any(parts) else ""


def seconds(value: float) -> str:
    """Return a short time as text, such as `12 ms`."""
    return f"{short(value * 1000)} ms" if value < 1 else f"{value:.3g} s"


def duration(value: float) -> str:
    """Return a long time as text, such as `2 h 5 min`."""
    if value < 60:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
