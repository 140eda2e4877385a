"""Micro-batches of equal work: every sample once, little padding, ranks that finish together, the same run."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from shardlaunch.launcher.runs.beginning import balance_text
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.batches import slots_of_rank
from shardlaunch.launcher.training.equal_work import composed, cuts, shares, work_of
from shardlaunch.sharding.world import World

SIZES = [(16, 8), (32, 8), (32, 4), (24, 8), (64, 8), (6, 1)]


def _plan(num_samples: int, sizes: tuple[int, int], *, equal_work: bool = True, seed: int = 0) -> BatchPlan:
    # As long as film reviews cut at 512 tokens.
    lengths = np.random.default_rng(1).lognormal(5.4, 0.65, num_samples).clip(10, 512).astype(np.int32)
    return BatchPlan(
        num_samples=num_samples,
        global_batch_size=sizes[0],
        micro_batch_size=sizes[1],
        seed=seed,
        lengths=lengths,
        equal_work=equal_work,
    )


def _step_work(plan: BatchPlan, num_ranks: int) -> float:
    """Return what the slowest rank of each step works, beside what samples without padding would be on all."""
    assert plan.lengths is not None
    slowest = 0.0
    for step in range(plan.steps_per_epoch):
        work = plan.work(step)
        slowest += max(sum(work[index] for index in of_rank) for of_rank in shares(work, num_ranks))
    return slowest / (work_of(plan.lengths).sum() / num_ranks)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_samples", [1, 31, 1603])
def test_every_sample_once_in_batches_of_the_same_size(num_samples: int, sizes: tuple[int, int]) -> None:
    plan = _plan(num_samples, sizes)
    for epoch in (0, 3):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            _, begin, end = plan.batch(step)
            of_ranks = [list(slots_of_rank(plan, step, rank=rank, num_ranks=3)) for rank in range(3)]
            assert len({len(slots) for slots in of_ranks}) == 1, "ranks must take part in the same collectives"
            slots = {slot.micro_batch: slot for slots in of_ranks for slot in slots if slot.weight}
            assert len(slots) == -(-(end - begin) // sizes[1]), "as many micro-batches as without"
            samples = np.concatenate([slots[index].samples for index in range(len(slots))])
            assert len(samples) == end - begin
            assert np.array_equal(samples, plan.between(epoch, begin, end)), "as on one rank"
            seen.append(samples)
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(num_samples))


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "most", "before"),
    [((16, 8), 2, 1.10, 1.25), ((32, 8), 4, 1.10, 1.5), ((64, 8), 8, 1.10, 1.7), ((32, 8), 2, 1.04, 1.10)],
)
def test_ranks_finish_together(sizes: tuple[int, int], num_ranks: int, most: float, before: float) -> None:
    assert _step_work(_plan(3200, sizes), num_ranks) < most
    assert _step_work(_plan(3200, sizes, equal_work=False), num_ranks) > before, "else there is nothing to gain"


def test_no_micro_batch_is_larger_than_one_of_the_longest_samples() -> None:
    plan = _plan(3200, (32, 8))
    assert plan.lengths is not None
    padded = [
        (end - begin) * plan.lengths[plan.between(0, begin, end)].max()
        for step in range(plan.steps_per_epoch)
        for begin, end in pairwise(plan.bounds(step))
    ]
    assert max(padded) < 0.85 * 8 * 512
    work = [sum(plan.work(step)) for step in range(plan.steps_per_epoch)]
    assert abs(np.corrcoef(work[:-1], work[1:])[0, 1]) < 0.3, "batches come in no order"


def test_a_cut_has_the_least_most_work() -> None:
    """Against all cuts."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.sort(rng.integers(1, 100, 7))
        work = work_of(lengths)
        every = [[0, a, b, 7] for a in range(1, 6) for b in range(a + 1, 7)]
        most = [max((end - begin) * work[end - 1] for begin, end in pairwise(bounds)) for bounds in every]
        found = cuts(lengths, 3)
        assert max((end - begin) * work[end - 1] for begin, end in pairwise(found)) == pytest.approx(min(most))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 12])
def test_batches_are_composed_of_all_samples(num_parts: int) -> None:
    lengths = np.sort(np.random.default_rng(0).integers(0, 500, (3, 120)), axis=1)
    places = composed(lengths, 12, num_parts)
    assert places.shape == (3, 10, 12)
    assert np.array_equal(np.sort(places.reshape(3, -1)), np.broadcast_to(np.arange(120), (3, 120)))
    assert (np.diff(places, axis=2) > 0).all(), "ascending"


def test_shares_are_as_many_and_as_much() -> None:
    found = shares([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 3)
    assert sorted(len(each) for each in found) == [2, 2, 3]
    assert sorted(index for each in found for index in each) == list(range(7))
    assert max(sum(index + 1 for index in each) for each in found) <= 11
    assert shares([8, 8, 8, 3], 2) == [[0, 2], [1, 3]], "in turn where they are equal"
    assert shares([5.0], 4) == [[0], [], [], []]


def test_how_long_ranks_wait_is_known_at_the_start() -> None:
    plan = _plan(3200, (64, 8))
    assert plan.waiting(8) < 0.08
    without = replace(plan, equal_work=False)
    assert without.waiting(8) == pytest.approx(0.45, abs=0.1)
    assert without.waiting(8) > without.waiting(2) > without.waiting(1) == pytest.approx(0)
    assert replace(without, lengths=None).waiting(8) == 0
    said = [
        balance_text(RunData(splits={}, plan=each, num_steps=1, last_step=1), World(size=num_ranks))
        for each, num_ranks in ((without, 8), (without, 1), (plan, 8))
    ]
    assert re.fullmatch(r"; ranks wait 4\d% of a step for longer samples \([67]% with --equal-work\)", said[0])
    assert said[1:] == ["", ", equal work"]


def test_it_is_another_run() -> None:
    plan = _plan(100, (16, 8))
    assert plan.digest() == replace(plan, equal_work=False).digest() + ", equal work"
    assert not np.array_equal(plan.between(0, 0, 16), replace(plan, equal_work=False).between(0, 0, 16))
    assert np.array_equal(plan.between(2, 16, 32), _plan(100, (16, 8)).between(2, 16, 32))
    assert not np.array_equal(plan.between(2, 16, 32), _plan(100, (16, 8), seed=1).between(2, 16, 32))
