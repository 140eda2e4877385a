"""Named cases of a campaign: each returns what is wrong, or nothing; run and printed as a table."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

Cases = Mapping[str, Callable[[], str]]


def run_cases(cases: Cases, only: str, say: Callable[[str], object]) -> int:
    """Run the cases whose name has `only` in it, print a line for each, and return the number of those that are bad."""
    num_bad = 0
    for case, problem_of in cases.items():
        if only not in case:
            continue
        began = time.monotonic()
        try:
            problem = problem_of()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            problem = repr(error)
        num_bad += bool(problem)
        say(f"{'bad' if problem else 'ok ':4} {time.monotonic() - began:5.0f} s  {case}  {problem}")
    return num_bad


def main_of_cases(doc: str | None, run: Callable[[str], int], why_not: Callable[[], str]) -> None:
    """Run a campaign as a command with `--only`, and exit: with 0 where it cannot run here, which is said."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    only = parser.parse_args().only
    if reason := why_not():
        print(f"skipped: {reason}")
        sys.exit(0)
    sys.exit(1 if run(only) else 0)
