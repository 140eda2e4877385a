"""Which cases of a campaign run: all, some at random, or one of several parts, so that parts may run side by side."""

import argparse
import random
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")


def add_choice(parser: argparse.ArgumentParser, *, count: int) -> None:
    """Add the options that choose cases."""
    parser.add_argument("--count", type=int, default=count, help="cases, chosen at random; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N equal parts of these")


def chosen(cases: Sequence[Case], count: int, seed: int, part: str) -> list[Case]:
    """Return `count` cases (0: all) in a random order, and of these the K-th of N parts."""
    number, num_parts = (int(word) for word in part.split("/"))
    return random.Random(seed).sample(cases, min(count or len(cases), len(cases)))[number - 1 :: num_parts]
