"""The batch plan: every sample once, for any sizes; similar lengths together; ranks in step."""

import itertools
from typing import Any

import numpy as np
import pytest

from shardlaunch.launcher.seeding import sample_seeds
from shardlaunch.launcher.training.batches import Batches, BatchPlan, EvaluationPlan, slots_of_rank

SIZES = list(itertools.product([1, 2, 7, 32, 33, 203], [(1, 1), (4, 2), (32, 4), (32, 32)], [1, 2, 3, 4, 8]))


def _plan(num_samples: int, sizes: tuple[int, int] = (32, 8), *, seed: int = 0, is_long: bool = True) -> BatchPlan:
    lengths = np.random.default_rng(1).integers(1, 500, num_samples) if is_long else None
    return BatchPlan(
        num_samples=num_samples, global_batch_size=sizes[0], micro_batch_size=sizes[1], seed=seed, lengths=lengths
    )


@pytest.mark.parametrize("is_long", [True, False])
@pytest.mark.parametrize(("num_samples", "sizes", "num_ranks"), SIZES)
def test_every_sample_once_an_epoch(num_samples: int, sizes: tuple[int, int], num_ranks: int, is_long: bool) -> None:
    plan = _plan(num_samples, sizes, is_long=is_long)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            micro_batches = plan.micro_batches(step)
            slots = [
                list(slots_of_rank(micro_batches, step=step, epoch=epoch, rank=rank, num_ranks=num_ranks))
                for rank in range(num_ranks)
            ]
            assert len({len(of_rank) for of_rank in slots}) == 1, "ranks must take part in the same collectives"
            assert sum(slot.weight for of_rank in slots for slot in of_rank) == len(micro_batches)
            seen += [s for of_rank in slots for slot in of_rank if slot.weight for s in slot.samples.tolist()]
            assert all(len(slot.samples) for of_rank in slots for slot in of_rank)
        assert sorted(seen) == list(range(num_samples))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = _plan(1000)
    assert np.array_equal(plan.order(3), _plan(1000).order(3))
    assert not np.array_equal(plan.order(3), plan.order(4))
    assert not np.array_equal(plan.order(3), _plan(1000, seed=1).order(3))
    assert plan.digest() == _plan(1000).digest() != _plan(1000, seed=1).digest()


def test_micro_batches_hold_similar_lengths_and_batches_do_not() -> None:
    plan = _plan(20_000)
    assert plan.lengths is not None
    lengths = [plan.lengths[samples] for step in range(plan.steps_per_epoch) for samples in plan.micro_batches(step)]
    padded = sum(len(one) * one.max() for one in lengths)
    assert padded / plan.lengths.sum() < 1.02, "random micro-batches pad by about 1.8"
    batch_means = [np.concatenate(lengths[i : i + 4]).mean() for i in range(0, len(lengths), 4)]
    assert np.std(batch_means) < 100, "batches of one length each would spread by about 144"


def test_the_partial_batch_is_last() -> None:
    plan = _plan(70)
    assert [sum(map(len, plan.micro_batches(step))) for step in range(3)] == [32, 32, 6]


def test_millions_of_samples_take_arrays_only() -> None:
    plan = _plan(2_000_000, (1024, 32))
    assert plan.order(0).dtype == np.int64
    assert len(np.unique(plan.order(0))) == 2_000_000


def test_evaluation_takes_the_shortest_first() -> None:
    plan = EvaluationPlan(
        num_samples=4, global_batch_size=2, micro_batch_size=1, seed=0, lengths=np.array([5, 1, 9, 3])
    )
    assert plan.order(0).tolist() == [1, 3, 0, 2]


def test_sample_seeds_depend_on_seed_epoch_and_sample_only() -> None:
    samples = np.arange(1000)
    seeds = sample_seeds(7, 2, samples)
    assert np.array_equal(sample_seeds(7, 2, samples[::-1]), seeds[::-1])
    everything = np.concatenate([seeds, sample_seeds(7, 3, samples), sample_seeds(8, 2, samples)])
    assert len(np.unique(everything)) == 3000
    assert everything.min() >= 0


class _Squares:
    """A map-style data set without batched access."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        return index * index


def _batches(num_workers: int) -> Batches:
    def collate(samples: list[int], seeds: np.ndarray | None) -> Any:
        assert seeds is not None
        return {"samples": samples, "seeds": seeds.tolist()}

    return Batches(
        _Squares(),
        BatchPlan(num_samples=50, global_batch_size=8, micro_batch_size=4, seed=0),
        collate=collate,
        num_targets=lambda batch: len(batch["samples"]),
        num_tokens=lambda batch: 0,
        rank=0,
        num_ranks=1,
        training=True,
        num_workers=num_workers,
    )


def test_loading_in_workers_gives_the_same_batches() -> None:
    alone, with_workers = list(_batches(0).steps(3, 12)), list(_batches(2).steps(3, 12))
    assert alone == with_workers
    assert [batch.step for batch in alone] == list(range(3, 12))
    assert [batch.num_samples for batch in alone][3] == 2
