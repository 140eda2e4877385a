"""Change strategy and ranks in one run, each way between all of them: python -m tests.faults.topologies [--seed S].

A chain of 73 steps goes once from each of nine places to each other one: one process, ddp, FSDP2, layers divided over 2
and 4 ranks, HSDP, ZeRO 3. Each resume must save what it has read with the same bytes, and train on with the losses of
one process within 1e-5. Prints a line per change; the exit status is 1 if one is bad.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.distributed.changes import all_changes, problems


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="wide", help="of the models of tests/distributed/tokens.py")
    arguments = parser.parse_args()
    num_bad, most = 0, 0.0
    chain = all_changes(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        for change, problem, difference in problems(chain, Path(folder), kind=arguments.kind):
            num_bad += bool(problem)
            most = max(most, difference)
            print(f"{'bad' if problem else 'ok ':4} {difference:.0e}  {change}  {problem}", flush=True)
    print(f"{len(chain) - 1} changes, {num_bad} bad; losses off by {most:.1e} at most")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
