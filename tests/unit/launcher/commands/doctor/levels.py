"""What the tests ask of findings."""

from collections.abc import Iterable

from shardlaunch.launcher.commands.doctor.findings import Finding


def said(findings: Iterable[Finding], level: str) -> str:
    """Return the texts and advice of a level, one line per finding."""
    return "\n".join(f"{one.text} -> {one.advice}" for one in findings if one.level == level)


def only(findings: Iterable[Finding], level: str, part: str) -> None:
    """Check that there is one finding that is not `ok`, of this level, with this part of a text."""
    others = [one for one in findings if one.level != "ok"]
    assert [one.level for one in others] == [level], others
    assert part in f"{others[0].text} -> {others[0].advice}", others


def fine(findings: Iterable[Finding]) -> None:
    """Check that all is well."""
    assert not [one for one in findings if one.level != "ok"]
