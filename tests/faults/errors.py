"""Fail each file-system call of a run in turn: the run goes on, or ends with one message, and leaves nothing half done.

    python -m tests.faults.errors --count 400 --seed 1

The runs and commands of `tests.faults.kills`, with each error: ENOSPC, EDQUOT, EROFS and short writes at each call that
changes something, EIO and ESTALE at all; at one call, at several, or from there to the end. `--count 0` takes all.
"""

import argparse
import errno
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults.calls import FAIL, SHORT, Call, Fault, Trial, under_the_shim
from tests.faults.choosing import add_choice, chosen
from tests.faults.small_runs import Reference, Scenario, scenarios

_CHANGING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ANY = (errno.EIO, errno.ESTALE)
_LENGTHS = (1, 1, 1, 5, 10**6)


class Case(NamedTuple):
    """A fault at a call of one rank."""

    scenario: Scenario
    rank: int
    fault: Fault

    def __str__(self) -> str:
        what = "short" if self.fault.mode == SHORT else errno.errorcode[self.fault.number]
        last = self.fault.last - self.fault.first + 1
        return f"{self.scenario.name}, rank {self.rank}, call {self.fault.first}, {what} x {last}"


def cases_of(scenario: Scenario, rank: int, calls: list[Call]) -> list[Case]:
    """Return all faults for the calls that a run without faults has made."""
    cases = []
    for call in calls:
        numbers = (*_ANY, *(_CHANGING if call.changes else ()))
        for length in sorted(set(_LENGTHS)):
            last = call.number + length - 1
            cases += [Case(scenario, rank, Fault(FAIL, call.number, last, number)) for number in numbers]
            if call.name == "write":
                cases.append(Case(scenario, rank, Fault(SHORT, call.number, last, errno.ENOSPC)))
    return cases


def outcome(case: Case, reference: Reference, folder: Path) -> tuple[str, Trial]:
    """Run a case and return how it ended: `as without`, `refused`, `stopped`, `no call`, or `BAD: why`."""
    run_dir = folder / "run"
    scenario = case.scenario
    scenario.prepare(run_dir)
    trial = scenario.run(run_dir, armed_rank=case.rank, fault=case.fault)
    reasons = []
    if trial.hit is None:
        return "no call", trial
    if re.search(r"Traceback|Exception in thread", trial.output):
        reasons.append("traceback")
    status = next((status for status in trial.statuses if status), 0)
    if not set(trial.statuses) <= {0, 1, 2}:
        reasons.append(f"exit status {trial.statuses}")
    if status and len(scenario.said(trial.output)) != 1:
        reasons.append("not one message")
    if re.search(r"(error|warning): .*(\[Errno|: None|Error\()", trial.output):
        reasons.append("message without a place")
    repeated = [line for line, times in Counter(trial.output.splitlines()).items() if times > 1 and "warning" in line]
    if repeated:
        reasons.append("said twice")
    left = scenario.leftovers(run_dir)
    if status == 0:
        found = reference.differences(run_dir)
        has_said = re.search("was not saved|could not be deleted", trial.output)
        reasons += [reason for reason in found if not (reason == "other checkpoints" and has_said)]
        if left and "could not be deleted" not in trial.output:
            reasons.append("left without a word")
    if status or left or reasons:
        again = scenario.run(run_dir)
        if any(again.statuses):
            reasons.append("not resumed")
            trial = Trial(statuses=trial.statuses, output=trial.output + "\nAGAIN\n" + again.output, calls=trial.calls)
        else:
            missing = "was not saved" in trial.output
            found = [one for one in reference.differences(run_dir) if not (one == "other checkpoints" and missing)]
            reasons += [f"{reason} after a resume" for reason in found]
            reasons += ["leftovers after a resume"] * bool(scenario.leftovers(run_dir))
    if reasons:
        return f"BAD: {', '.join(dict.fromkeys(reasons))}", trial
    return "as without" if status == 0 else f"refused with {status} ({trial.hit.name})", trial


def run(
    count: int,
    seed: int,
    *,
    part: str = "1/1",
    only: str = "",
    say: Callable[[str], object] = print,
    verbose: bool = False,
) -> int:
    """Run `count` random cases (0: all) and return how many are bad."""
    counts: Counter[str] = Counter()
    num_bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        cases: list[Case] = []
        references = {}
        for scenario in scenarios(folder, only):
            references[scenario.name] = Reference(scenario, folder / "reference")
            for rank in range(scenario.num_ranks):
                scenario.prepare(folder / "run")
                trial = scenario.run(folder / "run", armed_rank=rank)
                assert not any(trial.statuses), trial.output
                assert not references[scenario.name].differences(folder / "run")
                say(f"{scenario.name}, rank {rank}: {len(trial.calls)} calls")
                cases += cases_of(scenario, rank, trial.calls)
        say(f"{len(cases):,} faults")
        for number, case in enumerate(chosen(cases, count, seed, part)):
            ended, trial = outcome(case, references[case.scenario.name], folder)
            counts[ended] += 1
            if ended.startswith("BAD"):
                num_bad += 1
                hit = trial.hit
                say(f"{number}: {case} ({str(hit).replace(str(folder), '')}): {ended}")
                if verbose:
                    say(trial.output)
            elif verbose and ended.startswith("refused"):
                said = [line for line in trial.output.splitlines() if line.startswith("error: ")]
                say(f"{number}: {case} ({str(trial.hit).replace(str(folder), '')}): {said}")
    for ended, times in sorted(counts.items()):
        say(f"{times:6} {ended}")
    return num_bad


if __name__ == "__main__":
    under_the_shim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, count=400)
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    num_bad = run(arguments.count, arguments.seed, part=arguments.part, only=arguments.only, verbose=arguments.verbose)
    sys.exit(num_bad > 0)
