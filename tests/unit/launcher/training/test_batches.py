"""The batch plan: every sample once, for any sizes; similar lengths together; ranks in step."""

import gc
import itertools
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from shardlaunch.launcher.seeding import sample_seeds
from shardlaunch.launcher.training.batch_plan import VERSION, BatchPlan, EvaluationPlan
from shardlaunch.launcher.training.batches import Batches, slots_of_rank
from shardlaunch.launcher.training.former_order import FormerPlan

SIZES = list(itertools.product([1, 2, 7, 32, 33, 203], [(1, 1), (4, 2), (32, 4), (32, 32)], [1, 2, 3, 4, 8]))


def _plan(num_samples: int, sizes: tuple[int, int] = (32, 8), *, seed: int = 0, is_long: bool = True) -> BatchPlan:
    lengths = np.random.default_rng(1).integers(1, 500, num_samples) if is_long else None
    return BatchPlan(
        num_samples=num_samples, global_batch_size=sizes[0], micro_batch_size=sizes[1], seed=seed, lengths=lengths
    )


def _whole(plan: BatchPlan, epoch: int) -> np.ndarray:
    """Return the order of an epoch from its micro-batches."""
    first = epoch * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    return np.concatenate([samples for step in steps for samples in _micro_batches(plan, step)])


def _micro_batches(plan: BatchPlan, step: int) -> list[np.ndarray]:
    return [slot.samples for slot in slots_of_rank(plan, step, rank=0, num_ranks=1)]


@pytest.mark.parametrize("is_long", [True, False])
@pytest.mark.parametrize(("num_samples", "sizes", "num_ranks"), SIZES)
def test_every_sample_once_an_epoch(num_samples: int, sizes: tuple[int, int], num_ranks: int, is_long: bool) -> None:
    plan = _plan(num_samples, sizes, is_long=is_long)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            slots = [list(slots_of_rank(plan, step, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
            assert len({len(of_rank) for of_rank in slots}) == 1, "ranks must take part in the same collectives"
            assert sum(slot.weight for of_rank in slots for slot in of_rank) == len(_micro_batches(plan, step))
            seen += [s for of_rank in slots for slot in of_rank if slot.weight for s in slot.samples.tolist()]
            assert all(len(slot.samples) for of_rank in slots for slot in of_rank)
            assert {slot.epoch for of_rank in slots for slot in of_rank} == {epoch}
        assert sorted(seen) == list(range(num_samples))


@pytest.mark.parametrize("is_long", [True, False])
@pytest.mark.parametrize("sizes", [(32, 8), (4096, 1024), (1 << 18, 1 << 14), (12, 3)])
def test_any_step_alone_is_that_of_the_whole(sizes: tuple[int, int], is_long: bool) -> None:
    """Blocks end within epochs, and their last ones are smaller."""
    num_samples = 300_007
    plan = _plan(num_samples, sizes, is_long=is_long)
    for epoch in (0, 5):
        whole = _whole(plan, epoch)
        assert np.array_equal(np.sort(whole), np.arange(num_samples))
        for position in {0, 1, 49, 50, 51, 255, 256, plan.steps_per_epoch // 2, plan.steps_per_epoch - 1}:
            if position < plan.steps_per_epoch:
                alone = _plan(num_samples, sizes, is_long=is_long)
                found = np.concatenate(_micro_batches(alone, epoch * plan.steps_per_epoch + position))
                assert np.array_equal(found, whole[position * sizes[0] :][: sizes[0]])


def test_two_samples_share_a_batch_as_often_as_by_chance() -> None:
    num_samples, size, num_epochs = 256, 16, 2000
    plan = BatchPlan(num_samples=num_samples, global_batch_size=size, micro_batch_size=size, seed=1)
    together = np.zeros((num_samples, num_samples), dtype=np.int64)
    for epoch in range(num_epochs):
        batch_of = np.empty(num_samples, dtype=np.int64)
        batch_of[_whole(plan, epoch)] = np.arange(num_samples) // size
        together += batch_of[:, None] == batch_of
    share = (size - 1) / (num_samples - 1)
    counts = together[np.triu_indices(num_samples, 1)]
    assert counts.mean() == pytest.approx(num_epochs * share), "for any permutation"
    assert counts.var() == pytest.approx(num_epochs * share * (1 - share), rel=0.05)
    neighbours = np.diagonal(together, 1)
    assert abs(neighbours.mean() - num_epochs * share) < 4 * np.sqrt(num_epochs * share / len(neighbours))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = _plan(1000)
    assert np.array_equal(_whole(plan, 3), _whole(_plan(1000), 3))
    assert not np.array_equal(_whole(plan, 3), _whole(plan, 4))
    assert not np.array_equal(_whole(plan, 3), _whole(_plan(1000, seed=1), 3))


def test_the_digest_is_one_of_what_the_order_follows_from() -> None:
    plan = _plan(1000)
    assert plan.lengths is not None
    assert plan.digest() == _plan(1000).digest()
    for others in (_plan(1000, seed=1), _plan(1001), _plan(1000, (32, 4)), _plan(1000, (64, 8))):
        assert others.digest() != plan.digest()
    assert _plan(1000, is_long=False).digest() != plan.digest()
    lengths = plan.lengths.copy()
    lengths[777] += 1
    assert replace(plan, lengths=lengths).digest() != plan.digest()
    for dtype in (np.int16, np.uint32, np.float64, ">i8"):
        assert replace(plan, lengths=plan.lengths.astype(dtype)).digest() == plan.digest()


def test_the_order_is_that_of_its_version() -> None:
    """Whoever moves these must raise VERSION, and let runs that have begun keep their order."""
    lengths = np.arange(200) * 7919 % 101
    assert VERSION == 2
    plans = [
        BatchPlan(num_samples=200, global_batch_size=6, micro_batch_size=2, seed=5, lengths=each)
        for each in (None, lengths)
    ]
    assert [xxhash.xxh3_64_hexdigest(_whole(plan, 1).tobytes()) for plan in plans] == [
        "48eac835531baedb",
        "2068454d7171c9b7",
    ]
    former = [
        FormerPlan(num_samples=200, global_batch_size=6, micro_batch_size=2, seed=5, lengths=each.lengths)
        for each in plans
    ]
    assert [plan.digest() for plan in former] == [
        "55ed937c65b34486210aa90c64e87fe6",
        "c76ce034e1321e35d35381940d032fb3",
    ]


def test_micro_batches_hold_similar_lengths_and_batches_do_not() -> None:
    plan = _plan(20_000)
    assert plan.lengths is not None
    lengths = [plan.lengths[samples] for step in range(plan.steps_per_epoch) for samples in _micro_batches(plan, step)]
    padded = sum(len(one) * one.max() for one in lengths)
    assert padded / plan.lengths.sum() < 1.02, "random micro-batches pad by about 1.8"
    batch_means = [np.concatenate(lengths[i : i + 4]).mean() for i in range(0, len(lengths), 4)]
    assert np.std(batch_means) < 100, "batches of one length each would spread by about 144"
    assert abs(np.corrcoef(batch_means[:-1], batch_means[1:])[0, 1]) < 0.2, "batches come in no order"
    of_batches = np.array([[one.max() for one in lengths[i : i + 4]] for i in range(0, len(lengths), 4)])
    assert (np.diff(of_batches, axis=1) >= 0).all(), "ranks have similar lengths at the same time"


def test_the_partial_batch_is_last() -> None:
    plan = _plan(70)
    assert [sum(map(len, _micro_batches(plan, step))) for step in range(3)] == [32, 32, 6]


@pytest.mark.parametrize("is_long", [True, False])
def test_a_billion_samples_take_the_memory_of_a_block(tmp_path: Path, is_long: bool) -> None:
    num_samples = 1_000_000_000
    lengths = None
    if is_long:  # a file with holes, of which the blocks in question are read
        path = tmp_path / "lengths"
        with open(path, "wb") as file:
            file.truncate(num_samples)
        lengths = np.memmap(path, np.uint8, mode="r")
    plan = BatchPlan(num_samples=num_samples, global_batch_size=4096, micro_batch_size=8, seed=0, lengths=lengths)
    tracemalloc.start()
    samples = [_micro_batches(plan, step)[7] for step in (0, 1, 51, 244_140, 244_141 * 3, 10**6)]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6
    assert len(np.unique(samples)) == 6 * 8


def test_evaluation_takes_the_shortest_first() -> None:
    plan = EvaluationPlan(
        num_samples=4, global_batch_size=2, micro_batch_size=1, seed=0, lengths=np.array([5, 1, 9, 3])
    )
    assert _whole(plan, 0).tolist() == [1, 3, 0, 2]


def test_evaluation_sorts_a_million_at_once() -> None:
    num_samples = 2_500_000
    lengths = np.random.default_rng(0).integers(0, 1000, num_samples).astype(np.uint16)
    plan = EvaluationPlan(
        num_samples=num_samples, global_batch_size=100_000, micro_batch_size=50_000, seed=0, lengths=lengths
    )
    whole = _whole(plan, 0)
    assert np.array_equal(np.sort(whole), np.arange(num_samples))
    falls = np.flatnonzero(np.diff(lengths[whole].astype(int)) < 0) + 1
    assert falls.tolist() == [1_000_000, 2_000_000]


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


class _Garbage:
    """An object in a cycle, which only the collector of garbage finds; it notes which process that is in."""

    def __init__(self, notes: Path) -> None:
        self.itself = self
        self.notes = notes

    def __del__(self) -> None:
        with open(self.notes, "a") as file:
            print(os.getpid(), file=file)


def test_workers_leave_the_garbage_of_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setattr(_Squares, "__getitem__", lambda self, index: index + 0 * gc.collect())
    gc.disable()
    try:
        _Garbage(notes)
        list(_batches(1).steps(0, 1))
    finally:
        gc.enable()
    gc.collect()
    assert notes.read_text().split() == [str(os.getpid())]


def test_loading_in_workers_gives_the_same_batches() -> None:
    alone, with_workers = list(_batches(0).steps(3, 12)), list(_batches(2).steps(3, 12))
    assert alone == with_workers
    assert [batch.step for batch in alone] == list(range(3, 12))
    assert [batch.num_samples for batch in alone][3] == 2
