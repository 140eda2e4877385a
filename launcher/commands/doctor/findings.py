"""What the checks find, and how it is shown."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shardlaunch.errors import printable

Level = Literal["ok", "note", "problem"]
MOST_COLUMNS = 110
_INDENT = 11  # of the text behind a level


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    level: Level
    text: str
    """What was found, and what it means."""
    advice: str = ""
    """What to do."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The findings on one subject."""

    name: str
    findings: Sequence[Finding]
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, for --json."""


def ok(text: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(level="ok", text=text)


def note(text: str, advice: str = "") -> Finding:
    """Return a finding that may be meant, but is good to know."""
    return Finding(level="note", text=text, advice=advice)


def problem(text: str, advice: str = "") -> Finding:
    """Return a finding with which the command fails, or does something else than was asked for."""
    return Finding(level="problem", text=text, advice=advice)


def num_problems(sections: Iterable[Section]) -> int:
    """Return how many problems were found."""
    return sum(finding.level == "problem" for section in sections for finding in section.findings)


def document(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the report for --json."""
    return {
        "num_problems": num_problems(sections),
        "sections": [
            {
                "name": section.name,
                "findings": [asdict(finding) for finding in section.findings],
                "figures": section.figures,
            }
            for section in sections
        ],
    }


def print_section(section: Section) -> None:
    """Print a section, with lines as wide as the terminal."""
    columns = MOST_COLUMNS
    if sys.stdout.isatty():
        columns = min(columns, max(40, shutil.get_terminal_size().columns))
    print(f"\n{section.name}")
    for finding in section.findings:
        print(_wrapped(finding.text, f"  {finding.level:<9}", columns))
        if finding.advice:
            print(_wrapped(finding.advice, f"{'':{_INDENT}}-> ", columns))
    sys.stdout.flush()


def _wrapped(text: str, begin: str, columns: int) -> str:
    return textwrap.fill(
        printable(text, is_name=True),
        columns,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    )
