"""Kill each rank in turn at each file-system call that changes something: the same command ends as if nothing were.

    python -m tests.faults.kills --count 200 --seed 1

New runs and resumes, on 1 and 2 ranks, with saves beside the training and not, a second place and copies in memory, and
`shardlaunch ckpt prune` and `copy`; so at each change of a save, of retention, of a resume and of the records.
`--count 0` takes all of them. `--twice` kills the resume too.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.calls import KILL, Fault, under_the_shim
from tests.faults.choosing import add_choice, chosen
from tests.faults.small_runs import Reference, Scenario, scenarios


def outcome(scenario: Scenario, rank: int, calls: list[int], reference: Reference, run_dir: Path) -> str:
    """Kill a rank at a call, and in the resume at the next of `calls`, and resume; return how that ended."""
    scenario.prepare(run_dir)
    where = ""
    for call in calls:
        trial = scenario.run(run_dir, armed_rank=rank, fault=Fault(KILL, call, call))
        if trial.hit is None:
            break
        where = f"{trial.hit.name} {trial.hit.path}".replace(str(run_dir.parent), "")
        if re.search("Traceback", trial.output):
            return f"BAD at {where}: traceback"
        if 0 in trial.statuses:
            return f"BAD at {where}: statuses {trial.statuses}"
    again = scenario.run(run_dir)
    if any(again.statuses):
        return f"BAD at {where}: not resumed: {again.output[-500:]}"
    found = reference.differences(run_dir)
    left = [path.name for path in scenario.leftovers(run_dir)]
    return f"BAD at {where}: {', '.join(found + left)}" if found or left else "as without"


def run(
    count: int,
    seed: int,
    *,
    part: str = "1/1",
    is_twice: bool = False,
    only: str = "",
    say: Callable[[str], object] = print,
) -> int:
    """Kill at `count` random points (0: all) and return how many were bad."""
    counts: Counter[str] = Counter()
    random_ = random.Random(f"{seed} {part}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        points = []
        references = {}
        for scenario in scenarios(folder, only):
            references[scenario.name] = Reference(scenario, folder / "reference")
            for rank in range(scenario.num_ranks):
                scenario.prepare(folder / "run")
                trial = scenario.run(folder / "run", armed_rank=rank, fault=Fault(KILL, 10**9, 10**9))
                say(f"{scenario.name}, rank {rank}: {len(trial.calls)} calls that change something")
                points += [(scenario, rank, call.number) for call in trial.calls]
        for scenario, rank, call in chosen(points, count, seed, part):
            calls = [call, random_.randrange(1, 150)] if is_twice else [call]
            ended = outcome(scenario, rank, calls, references[scenario.name], folder / "run")
            counts[ended] += 1
            if ended.startswith("BAD"):
                say(f"{scenario.name}, rank {rank}, call {calls}: {ended}")
    for ended, times in sorted(counts.items()):
        say(f"{times:6} {ended}")
    return sum(counts.values()) - counts["as without"]


if __name__ == "__main__":
    under_the_shim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, count=200)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    num_bad = run(arguments.count, arguments.seed, part=arguments.part, is_twice=arguments.twice, only=arguments.only)
    sys.exit(num_bad > 0)
